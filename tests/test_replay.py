"""Networks that no trace can follow, cut by running them: the halves' steps against the uncut network's, bit for bit."""

import copy
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from halfpass.arithmetic.optimizers import build_optimizer
from halfpass.errors import InputError, RunError
from halfpass.networks.observe import copied, observe, tensors_in
from halfpass.networks.replay import plan_as_dict, plan_from_dict
from halfpass.networks.split import split, split_by
from halfpass.tree import call, map_leaves


def draws(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


class Three(nn.Module):
    """Three layers, of which what the subclasses do with them matters."""

    def __init__(self, **how):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.__dict__.update(how)


class Condition(Three):
    def forward(self, x):
        h = self.a(x)
        if h.mean() > -100:  # always, but no trace can know
            h = h * 2
        return self.c(F.relu(self.b(h)) + h)


class Regions(Three):
    def forward(self, x):
        h = self.a(x)
        with torch.autocast("cpu", torch.bfloat16):
            h = self.b(h)
            with torch.autocast("cpu", enabled=False):
                h = h.float() * 1.1
        return self.c(h)


class Checkpointed(Three):
    def forward(self, x):
        h = checkpoint(self.a, x, use_reentrant=False)
        return self.c(checkpoint(lambda v: F.gelu(self.b(v)), h, use_reentrant=False))


class Counter(Three):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.c(self.b(self.a(x) * self.calls) * self.calls)


class Skipping(Three):
    def forward(self, x):
        draw = {"torch": lambda: torch.rand(()).item(), "python": random.random, "numpy": np.random.rand}[self.how]
        h = x @ self.a.weight
        if draw() < 0.5:
            h = h + self.a(x)
        h = F.dropout(self.b(h), 0.3, self.training)
        if draw() < 0.5:
            h = h * 2
        return self.c(F.dropout(h, 0.2, self.training))


class Custom(Three):
    def forward(self, x):
        h = self.a(x)
        k = Square.apply(h)
        return self.c(Square.apply(self.b(k)) + k)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Shaking(Three):
    """Draws in the backward pass too, after ShakeDrop (Yamada et al. 2018, arXiv 1802.02375)."""

    def forward(self, x):
        h = self.a(x)
        return self.c(Shake.apply(self.b(Shake.apply(h) + h)))


class Shake(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * torch.rand(())

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.rand(())


class Telling(Three):
    """Returns what is in between too, as networks with `hidden_states` do."""

    def forward(self, x):
        first = self.a(x) if x.mean() > -100 else x
        second = self.b(F.relu(first))
        return first, second, self.c(F.relu(second))


class InPlace(Three):
    def forward(self, x):
        h = self.a(x)
        assert h.std() > 0
        h.add_(1).relu_()
        return self.c(self.b(h) + h)


class Encoder(nn.Module):
    """Tokens and a mask, which is used in every layer; places that depend on the length alone; a dict comes out."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))
        self.out = nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask):
        places = torch.arange(input_ids.shape[1]).float()[None, :, None]
        h = self.tokens(input_ids) + places * 0.01
        for layer in self.layers:
            h = layer(h, src_key_padding_mask=attention_mask == 0)
        mean = (h * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return {"logits": self.out(mean + places.mean())}


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.LSTM(6, 5), nn.GRU(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        h, state = self.one(x.transpose(0, 1))
        if state[0].abs().sum() < 0:
            h = -h
        h, _ = self.two(h)
        return self.out(h[-1])


class Windows(Three):
    """Every sample's parts are samples of their own below: its parts follow on each other, or the first parts of all."""

    def forward(self, x):
        samples, parts, width = x.shape
        h = (x.transpose(0, 1) if self.mixed else x).reshape(samples * parts, width)
        h = self.b(F.relu(self.a(h)))
        assert h.std() > 0
        h = h.view(parts, samples, width).transpose(0, 1) if self.mixed else h.view(samples, parts, width)
        return self.c(h.mean(1))


class Shared(nn.Module):
    """A bias made of weights is used in both layers: it is of no sample, and crosses as a whole."""

    def __init__(self):
        super().__init__()
        self.bias, self.a, self.b, self.out = nn.Embedding(8, 4), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        bias, h = self.bias(torch.arange(5)).mean(1)[None, :, None], self.a(x)
        return self.out((self.b(F.relu(h + bias)) + bias).mean(1))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_1, self.down_2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1)
        self.up, self.out = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4 + 4, 2, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        first = self.norm(F.relu(self.down_1(x)))
        deep = F.relu(self.down_2(first))
        return self.out(torch.cat([first, F.interpolate(self.up(deep), x.shape[-2:], mode="bilinear")], 1))


class GroupedUNet(UNet):
    """Group norms below and above the cut; a skip, and a value that no trace can know."""

    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.GroupNorm(2, 4), nn.GroupNorm(2, 8)

    def forward(self, x):
        first = self.norm(F.relu(self.down_1(x)))
        scale = 2 if first.mean() > -100 else 1
        deep = self.last(F.relu(self.down_2(first)))
        return self.out(torch.cat([first * scale, F.interpolate(self.up(deep), x.shape[-2:], mode="bilinear")], 1))


class Running(Three):
    """A buffer that is a new tensor after each step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        h = self.a(x)
        if self.training:
            self.mean = self.mean * 0.9 + h.detach().mean(0) * 0.1
        return self.c(self.b(h))


class Keeping(Running):
    """Puts away what it has seen, and never looks at it."""

    def forward(self, x):
        h = self.a(x)
        self.mean = h.detach().mean(0)
        return self.c(self.b(h))


class Marked(Three):
    """What it marks by depends on the size of its input alone, of which no value crosses."""

    def forward(self, x):
        marks = torch.ones_like(x)
        marks[:, 0] = 0
        h = self.a(x)
        return self.c(self.b(h * marks) + x.new_full(h.shape, 0.5))


class Dropping(Three):
    """Half the tokens are dropped in training, after PatchDropout (Liu et al. 2022, arXiv 2208.07220)."""

    def forward(self, x):
        h = self.a(x)
        if self.training:
            kept = torch.rand(x.shape[:2]).topk(4, dim=-1).indices
            h = h.gather(1, kept[..., None].expand(-1, -1, 6))
        return self.c(F.gelu(self.b(h)).mean(1))


class Placed(Three):
    """Puts another tensor in its buffer's place in each forward pass, as CTRL of transformers does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("places", draws(1, 6), persistent=False)

    def forward(self, x):
        self.places = self.places.to(x.dtype).view(1, 6)
        return self.c(F.relu(self.b(self.a(x) + self.places)))


class Settling(Three):
    """The first batch sets a scale, and a buffer remembers that, after ActNorm (Kingma and Dhariwal 2018, arXiv
    1807.03039): later passes write nothing."""

    def __init__(self, **how):
        super().__init__(**how)
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("settled", torch.tensor(0))

    def forward(self, x):
        h = self.a(x)
        if self.settled == 0 and self.training:
            with torch.no_grad():
                self.scale.copy_(1 / h.std(0))
            if self.how == "filled":
                self.settled.fill_(1)
            elif self.how == "added":
                self.settled += 1
            else:
                self.settled = torch.tensor(1)
        return self.c(F.relu(self.b(h * self.scale)))


class Experts(nn.Module):
    """Two experts in one product, as transformers' mixtures compute them."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(8, 8), nn.Linear(8, 3)
        self.experts = nn.Parameter(draws(2, 8, 8))
        self.b = nn.Linear(8, 8)

    def forward(self, x):
        rows = self.a(x).transpose(0, 1).flatten(0, 1)  # (B, 8, 8) → (8 × B, 8): four tokens for each expert
        ends = torch.tensor([len(rows) // 2, len(rows)], dtype=torch.int32)
        mixed = F.grouped_mm(rows, self.experts, offs=ends)
        return self.c(self.b(mixed).unflatten(0, (8, -1)).mean(0))


MASKED = {
    "input_ids": torch.randint(0, 20, (5, 9), generator=torch.Generator().manual_seed(1)),
    "attention_mask": (torch.arange(9)[None] < torch.tensor([9, 3, 5, 7, 2])[:, None]).long(),
}
CASES = [
    (Condition(), "a", draws(5, 6)),
    (Condition(), "b", draws(5, 6)),
    (Regions(), "a", draws(5, 6)),
    (Regions(), "b", draws(5, 6)),
    (Checkpointed(), "a", draws(5, 6)),
    (Counter(), "a", draws(5, 6)),
    (Skipping(how="torch"), "b", draws(5, 6)),
    (Skipping(how="python"), "b", draws(5, 6)),
    (Skipping(how="numpy"), "b", draws(5, 6)),
    (Custom(), "a", draws(5, 6)),
    (Custom(), "b", draws(5, 6)),
    (InPlace(), "a", draws(5, 6)),
    (Shaking(), "b", draws(5, 6)),
    (Telling(), "a", draws(5, 6)),
    (Telling(), "b", draws(5, 6)),
    (Encoder(), "tokens", MASKED),
    (Encoder(), "layers.0", MASKED),
    (Encoder(), "layers.2", MASKED),
    (TimeFirst(), "one", draws(5, 7, 6)),
    (Windows(mixed=False), "a", draws(5, 7, 6)),
    (Windows(mixed=True), "a", draws(5, 7, 6)),
    (Shared(), "a", draws(5, 5, 6)),
    (UNet(), "down_2", draws(4, 3, 9, 9)),
    (GroupedUNet(), "last", draws(4, 3, 9, 9)),
    (GroupedUNet(), "down_2", draws(4, 3, 9, 9)),
    (Marked(), "a", draws(5, 6)),
    (Dropping(), "a", draws(5, 8, 6)),
    (Dropping(), "b", draws(5, 8, 6)),
    (Placed(), "b", draws(5, 6)),
    (Running(), "a", draws(5, 6)),
    (Running(), "b", draws(5, 6)),
    (Keeping(), "a", draws(5, 6)),
    (Keeping(), "b", draws(5, 6)),
    *((Settling(how=how), cut, draws(5, 6)) for how in ("filled", "added", "replaced") for cut in ("a", "b")),
    (Experts(), "b", draws(4, 8, 8)),
]


def named(case):
    return "-".join(filter(None, (type(case[0]).__name__, getattr(case[0], "how", None), case[1])))


def seed(value):
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def loss_of(outputs):
    return sum((tensor.float() ** 2).mean() for tensor in tensors_in(outputs))


def train_whole(model, inputs, steps):
    model = copied(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        seed(step)
        optimizer.zero_grad()
        loss_of(call(model, map_leaves(torch.clone, inputs))).backward()
        optimizer.step()
    return model.state_dict()


def train_halves(halves, inputs, steps):
    """The same by two halves, each with an optimizer of its own; what crosses is copied as the wire does."""
    sides = [halves.client.train(), halves.server.train()]
    optimizers = [torch.optim.SGD(side.parameters(), lr=0.1, momentum=0.9) for side in sides]
    for step in range(steps):
        seed(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        crossing = call(halves.client, map_leaves(torch.clone, inputs))
        received = [tensor.detach().contiguous().clone().requires_grad_(tensor.requires_grad) for tensor in crossing]
        where = torch.get_rng_state()
        seed(step)  # Python's and NumPy's: both sides go through the same Python
        torch.set_rng_state(where)
        loss_of(halves.server(*received)).backward()
        pairs = [(a, b.grad) for a, b in zip(crossing, received, strict=True) if b.grad is not None]
        torch.autograd.backward([a for a, _ in pairs], [gradient for _, gradient in pairs])
        for optimizer in optimizers:
            optimizer.step()
    return halves.client.state_dict() | halves.server.state_dict()


@pytest.mark.parametrize("case", CASES, ids=named)
def test_halves_train_and_answer_as_the_network_does(case):
    model, layer, inputs = case
    halves = split(model, layer, inputs)
    uncut = train_whole(model, inputs, steps=3)
    trained = train_halves(copy.deepcopy(halves), inputs, steps=3)
    assert trained.keys() == uncut.keys()
    assert all(torch.equal(trained[name], uncut[name]) for name in uncut)
    assert not all(torch.equal(value, model.state_dict()[name]) for name, value in trained.items())  # it has moved
    with torch.no_grad():
        seed(9)
        expected = tensors_in(call(copied(model).eval(), inputs))
        seed(9)
        crossing = call(halves.client.eval(), inputs)
        where = torch.get_rng_state()
        seed(9)
        torch.set_rng_state(where)
        found = tensors_in(halves.server.eval()(*crossing))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_plan_survives_json_and_cuts_elsewhere_without_data(case):
    model, layer, inputs = case
    halves = split(model, layer, inputs)
    if halves.plan is None:
        pytest.skip("cut as a graph")
    plan = plan_from_dict(json.loads(json.dumps(plan_as_dict(halves.plan))))
    assert plan == halves.plan
    seed(0)
    crossing = call(halves.client.eval(), inputs)
    elsewhere = split_by(model, plan).server.eval()
    expected, found = (tensors_in(server(*crossing)) for server in (halves.server.eval(), elsewhere) if seed(1) is None)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_what_crosses():
    def values(model, layer, inputs):
        plan = split(model, layer, inputs).plan
        return [(value.shape, value.dtype, value.whole) for value in plan.values], plan.train.reads

    assert values(Condition(), "b", draws(5, 6)) == ([((6,), "float32", False)] * 2, True)
    assert values(Encoder(), "layers.0", MASKED) == (
        [((9, 8), "float32", False), ((9,), "int64", False)], False,
    )  # and the mask, exactly; not the places
    assert values(Windows(mixed=True), "a", draws(5, 7, 6)) == ([((7, 6), "float32", False)], False)
    assert values(TimeFirst(), "one", draws(5, 7, 6)) == (
        [((7, 5), "float32", False), ((1, 5), "float32", False)], False,
    )  # the samples are PyTorch's second dimension
    assert values(Shared(), "a", draws(5, 5, 6)) == ([((5, 6), "float32", False), ((1, 5, 1), "float32", True)], False)


class Sparing(Encoder):
    """Leaves its mask out where it masks nothing, as networks of text do."""

    def forward(self, input_ids, attention_mask):
        h, padding = self.tokens(input_ids), None
        if not attention_mask.all():
            padding = attention_mask.bool().logical_not() * self.tokens.weight.isfinite().all()
        for layer in self.layers:
            h = layer(h, src_key_padding_mask=padding)
        return {"logits": self.out(h.mean(1))}


@pytest.mark.parametrize("tried", [MASKED["attention_mask"], torch.ones(5, 9, dtype=torch.long)], ids=["some", "none"])
def test_batches_with_and_without_padding_go_their_own_way(tried):
    model = Sparing().eval()
    halves = split(model, "layers.0", MASKED | {"attention_mask": tried})
    client, server = halves.client.eval(), halves.server.eval()
    answers = []
    for mask in (MASKED["attention_mask"], torch.ones(5, 9, dtype=torch.long)):
        for count in (5, 1):
            inputs = {"input_ids": MASKED["input_ids"][:count], "attention_mask": mask[:count]}
            with torch.no_grad():
                answers.append(server(*client(**inputs))["logits"])
                assert torch.equal(answers[-1], model(**inputs)["logits"])
    assert not torch.equal(answers[0], answers[2])


@pytest.mark.parametrize("mixed", [False, True])
def test_samples_of_windows_can_be_merged(mixed):
    """Two batches, each cut alone, are one batch for the server half, sample by sample."""
    halves = split(Windows(mixed=mixed), "a", draws(5, 7, 6))
    client, server = halves.client.eval(), halves.server.eval()
    one, other = draws(3, 7, 6), draws(2, 7, 6) + 1
    together = [torch.cat(pair) for pair in zip(client(one), client(other), strict=True)][:-1]
    reads = client(torch.cat([one, other]))[-1]
    apart = torch.cat([server(*client(one)), server(*client(other))])
    torch.testing.assert_close(server(*together, reads), apart)


def test_a_graph_is_kept_where_nothing_is_lost():
    plain = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    assert split(plain, "1", draws(5, 6)).plan is None
    plain[0].register_forward_hook(lambda module, args, output: output * 2)
    assert split(plain, "1", draws(5, 6)).plan is not None


class Grouped(nn.Module):
    """A group norm behind the cut, with or without a value that no trace can know."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x):
        h = self.a(x)
        if self.how == "run" and h.mean() > 100:
            h = h * 2
        return self.b(F.relu(self.norm(h)))


@pytest.mark.parametrize("how", ["run", "graph", "pair"])
def test_group_norms_of_what_crossed_take_a_gradient(how):
    model, x = Grouped(how), draws(4, 3, 6, 6)
    pair = (nn.Sequential(copy.deepcopy(model.a)), nn.Sequential(copy.deepcopy(model.norm), nn.ReLU(), model.b))
    server = split(pair if how == "pair" else model, "" if how == "pair" else "a", x).server.train()
    seen = []
    norm = next(part for part in server.modules() if isinstance(part, nn.GroupNorm))
    norm.register_forward_hook(lambda module, args, output: seen.append(output.grad_fn.next_functions[0][0]))
    last = draws(4, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    server(last)
    assert seen[0] is not None  # the backward pass goes on to the input of the norm
    server(last.contiguous())
    assert seen[1] is None
    assert not last.requires_grad


@pytest.mark.parametrize("how", ["run", "graph"])
def test_so_do_those_behind_what_is_frozen(how):
    model, x = Grouped(how), draws(4, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    model.a.requires_grad_(False)
    client = split(model, "norm", x).client.train()
    seen = []
    norm = next(part for part in client.modules() if isinstance(part, nn.GroupNorm))
    norm.register_forward_hook(lambda module, args, output: seen.append(output.grad_fn.next_functions[0][0]))
    client(x)
    assert seen[0] is not None


def test_hooks_act_in_the_halves():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 3))
    mask = (torch.arange(9) % 2).float()[:, None]
    model[0].weight.register_hook(lambda gradient: gradient * mask)
    model.register_forward_pre_hook(lambda module, args: (args[0].flip(1),) if module.training else args)
    tokens = torch.randint(0, 9, (5, 4), generator=torch.Generator().manual_seed(0))
    halves = split(model, "2", tokens)
    trained = train_halves(halves, tokens, steps=2)
    expected = train_whole(model, tokens, steps=2)
    assert all(torch.equal(trained[name], expected[name]) for name in expected)
    assert torch.equal(trained["0.weight"][::2], model[0].weight[::2])
    assert not torch.equal(trained["0.weight"], model[0].weight)


def test_the_network_itself_is_left_as_it_was():
    model = Counter()
    before = copy.deepcopy(model.state_dict())
    seed(5)
    state = torch.get_rng_state()
    split(model, "a", draws(5, 6))
    assert model.calls == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_half_takes_no_room_for_the_other():
    model = Condition()
    halves = split(model, "a", draws(5, 6))
    for half, own in ((halves.client, {"a.weight", "a.bias"}), (copy.deepcopy(halves.client), {"a.weight", "a.bias"})):
        assert {name for name, _ in half.named_parameters()} == own == half.state_dict().keys()
        assert {name for name, p in half.network.named_parameters() if p.untyped_storage().nbytes() > 4} == own
    halves.client.to(torch.float64)
    assert halves.client.network.a.weight.dtype == torch.float64
    assert halves.client.network.b.weight.dtype == torch.float32


def refusal(model, layer, inputs):
    with pytest.raises(InputError) as caught:
        split(model, layer, inputs)
    return str(caught.value)


class RawAbove(Three):
    def forward(self, x):
        return self.c(self.b(self.a(x)) + x * 2)


class Tied(Three):
    def forward(self, x):
        h = self.a(x)
        return self.c(self.b(h) @ self.a.weight) if h.std() >= 0 else h


class ByPlace(nn.Module):
    """What becomes of a row depends on its place in the batch, so that its samples cannot be told apart."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        rows = x.flatten(0, 1)
        return self.b(self.a(rows * torch.arange(len(rows))[:, None])).unflatten(0, x.shape[:2])


class Unrepeatable(Three):
    generator = np.random.default_rng()

    def forward(self, x):
        return self.c(self.b(self.a(x))) + self.generator.random()


class Lengths(Three):
    def forward(self, x):
        lengths = (x[:, 0] > 0).long().tolist()
        return self.c(self.b(self.a(x))) + sum(lengths)


class Spanning(Three):
    def forward(self, x):
        return self.c(checkpoint(lambda v: self.b(F.relu(self.a(v))), x, use_reentrant=False))


@pytest.mark.parametrize(
    ("model", "layer", "text"),
    [
        (RawAbove(), "a", "model.cut 'a': expected values that the client half has learned, found the raw input, (5, 6), used above the cut; cut at another layer: the data itself must not cross"),
        (Tied(), "a", "model.cut 'a': expected weights and buffers that one half uses, found 'a.weight' used by both halves; cut where all its uses are on one side, or freeze it (model.freeze)"),
        (Lengths(), "a", "model.cut 'a': expected single numbers where Python reads values of data below the cut, found list by tolist(); cut at another layer, or read it above the cut"),
        (Condition(), "d", "model.cut 'd': expected the name of a layer, found no such layer; for instance a, b, c"),
        (Condition(), "c", "model.cut 'c': expected a server half with something to train, found no trainable parameter in it; cut earlier, or freeze less"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_by_name(model, layer, text):
    assert refusal(model, layer, draws(5, 6)) == text
    if isinstance(model, Condition):
        split(model, "a", draws(5, 6))


class Neighbours(nn.Module):
    """Nodes that learn from their neighbours, layer after layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, nodes, adjacency):
        h = F.relu(self.a(adjacency @ nodes))
        h = F.relu(self.b(adjacency.softmax(-1) @ h))
        return self.c(adjacency @ h)


def test_an_input_crosses_where_its_owner_says_so():
    model, graph = Neighbours(), {"nodes": draws(5, 4, 6), "adjacency": draws(5, 4, 4) ** 2}
    assert refusal(model, "a", graph) == (
        "model.cut 'a': expected values that the client half has learned, found the raw input 'adjacency', (5, 4, 4), used above the cut; cut at another layer: the data itself must not cross, unless model.may_cross names it"
    )
    halves = split(model, "a", graph, may_cross=["adjacency"])
    assert [(value.shape, value.exact) for value in halves.plan.values] == [((4, 6), False), ((4, 4), True)]
    uncut, trained = train_whole(model, graph, steps=3), train_halves(halves, graph, steps=3)
    assert all(torch.equal(trained[name], uncut[name]) for name in uncut)
    with pytest.raises(InputError, match="expected names of inputs: nodes, adjacency, found 'edges'"):
        split(model, "a", graph, may_cross=["edges"])


def test_values_without_an_order_of_samples_are_refused():
    assert refusal(ByPlace(), "a", draws(5, 7, 6)) == (
        "model.cut 'a': expected an output of the layer that has a dimension of samples, found values that depend on the sample's place in the batch; cut at another layer, or give the two halves: --model.name module:function that returns (client half, server half)"
    )


def test_what_would_differ_is_refused():
    assert "a network that repeats itself under one seed, found another output 0" in refusal(Unrepeatable(), "a", draws(5, 6))
    assert "halves that do exactly what the network does, found another gradient of b.weight" in refusal(Spanning(), "a", draws(5, 6))


def test_hooks_that_hold_the_network_are_refused():
    model = Condition()
    model.a.register_forward_hook(lambda module, args, output: output * (2 if model.training else 1))
    assert refusal(model, "a", draws(5, 6)) == (
        "model Condition, a hook of a: expected hooks that look at the module or gradient that they are given, "
        "found one that holds a part of the network; use the hook's first argument instead"
    )


class Seldom(Three):
    """What is above is used by large values alone: a number, whole numbers, and truth values that are buffers."""

    def __init__(self, **how):
        super().__init__(**how)
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("order", torch.arange(5, -1, -1))
        self.register_buffer("kept", torch.arange(6) < 4)
        self.never = nn.Linear(2, 2)

    def forward(self, x):
        h = self.a(x)
        if self.below:
            h = self.seldom(h)
        h = self.b(h.relu())
        return self.c(h if self.below else self.seldom(h))

    def seldom(self, h):
        if h.abs().max() > 20:
            h = {"factor": lambda: h * self.factor, "order": lambda: h[:, self.order], "kept": lambda: h * self.kept}[self.how]()
        return h


class Mixture(nn.Module):
    """Each sample goes to one expert, by its sign: of the first samples all to one."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(6, 6), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        h = self.a(x)
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            rows = ((h[:, 0] > 0).long() == number).nonzero().flatten()
            if len(rows) > 0:
                out[rows] = expert(h[rows])
        return self.c(out.relu())


def later(module, batches, halves=None):
    """Trains on batches that the cut was not tried on."""
    modules = [module] if halves is None else [halves.client, halves.server]
    parameters = [p for each in modules for p in each.parameters()]
    optimizer = build_optimizer("sgd", parameters, lr=0.01, momentum=0.9, nesterov=False, weight_decay=0.0)
    for x in batches:
        optimizer.zero_grad()
        outputs = module(x) if halves is None else halves.server(*halves.client(x))
        loss_of(outputs).backward()
        optimizer.step()
    return {name: value for each in modules for name, value in each.state_dict().items()}


@pytest.mark.parametrize("how", ["factor", "order", "kept"])
def test_what_only_later_samples_use_is_as_uncut_or_refused(how):
    seed(0)
    few, many = draws(5, 6), [draws(5, 6) * 100, draws(4, 6)]
    model = Seldom(how=how, below=False)
    halves = split(model, "a", few)
    assert halves.plan is not None
    state, expected = later(None, many, halves), later(copied(model).train(), many)
    assert state.keys() == expected.keys()  # what is never used is there too
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert torch.equal(state["factor"], torch.tensor(2.0)) == (how != "factor")

    halves = split(Seldom(how=how, below=True), "b", few)
    with pytest.raises(RunError) as refused:
        later(None, many, halves)
    assert f"found '{how}', which it has not; cut at another layer: which half uses that depends on the samples" in str(refused.value)


def test_an_expert_that_no_sample_went_to_at_first_is_trained():
    seed(0)
    few, many = draws(5, 6) / 100, [draws(5, 6) * 9, draws(5, 6) * 9 + 1]
    model = Mixture()
    nn.init.constant_(model.a.bias, -1.0)
    halves = split(model, "a", few, may_cross=())
    assert "experts.1.weight" in halves.plan.unused
    assert "experts.1.weight" in halves.plan.server
    state, expected = later(None, many, halves), later(copied(model).train(), many)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not torch.equal(state["experts.1.weight"], model.state_dict()["experts.1.weight"])


class Overwritten(Three):
    def forward(self, x):
        h = self.a(x)
        h[:, :3].mul_(2)
        g = self.b(h)
        h[:, 3:].add_(1)
        return self.c(g + h)


def test_a_network_that_cannot_train_by_itself_is_refused():
    text = refusal(Overwritten(), "a", draws(5, 6))
    assert text.startswith("model.cut 'a': expected a network that runs and trains by itself, found RuntimeError: one of")
    assert text.endswith("in training mode with 5 samples; make it train uncut first")


class Sparse(Three):
    def forward(self, x):
        h = self.a(x)
        graph = torch.eye(6).to_sparse_csr()
        assert h.std() > 0
        return self.c(self.b((graph @ h.t()).t()))


class Odd(Three):
    """Raises where it is looked at from outside, as some of PyTorch's own kinds of tensors do."""

    def forward(self, x):
        h = self.a(x)
        assert h.std() > 0
        return self.c(self.b(torch.nested.nested_tensor([*h]).to_padded_tensor(0.0)))


@pytest.mark.parametrize("kind", [Sparse, Odd])
def test_tensors_of_other_layouts_are_cut_exactly_or_refused(kind):
    model, inputs = kind(), draws(5, 6)
    try:
        halves = split(model, "a", inputs)
    except InputError as error:
        assert error.place == "model.cut 'a'"  # noqa: PT017  # either is right, a crash is not
    else:
        expected = train_whole(model, inputs, steps=2)
        trained = train_halves(halves, inputs, steps=2)
        assert all(torch.equal(trained[name], expected[name]) for name in expected)


class Sometimes(Three):
    turned = False

    def forward(self, x):
        h = self.b(x) if self.turned else self.a(x)
        return self.c(self.b(h) if h.std() > 0 else h)


def test_a_layer_that_is_passed_by_is_an_error():
    halves = split(Sometimes(), "a", draws(5, 6))
    halves.client.network.turned = True
    with pytest.raises(RunError, match="layer a: expected 1 returns, as at the start, found fewer"):
        halves.client(draws(5, 6))
    halves.client.network.turned = False
    assert len(halves.client(draws(5, 6))) == 1
    with pytest.raises(InputError, match="the server half: expected 1 tensors that cross, found 2"):
        halves.server(draws(5, 6), draws(5, 6))


def test_plans_that_are_none_are_refused():
    with pytest.raises(InputError, match="the plan of the cut: expected one as halfpass makes it"):
        plan_from_dict({"layer": "a"})


def test_observing_says_what_a_trace_would_lose():
    def lost(model, inputs):
        return observe(model, inputs, training=True).lost

    assert lost(nn.Linear(6, 6), draws(5, 6)) is None
    assert lost(Condition(), draws(5, 6)) == "its forward reads a value of its data (__bool__)"
    assert lost(Regions(), draws(5, 6)) == lost(Checkpointed(), draws(5, 6))
    assert lost(Regions(), draws(5, 6)) == "its forward changes the gradient mode, autocast or what autograd saves"
    assert lost(Counter(), draws(5, 6)) == "its forward changes its Python attributes"
    assert lost(Skipping(how="numpy"), draws(5, 6)) == "it draws random numbers in Python or NumPy"
