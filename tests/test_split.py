"""Halves, one after the other, are the whole: bit for bit, in both modes, with gradients and running statistics.

And what cannot be cut without changing it is refused, with the reason. The oracle is the uncut model.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfpass.config import Config, ModelConfig
from halfpass.errors import InputError
from halfpass.networks.cut_table import cut_table
from halfpass.networks.models import build_model
from halfpass.networks.split import Halves, check_same, cut_shapes, join_state, layer_names, split, whole
from halfpass.run.network import build_network


def chain(halves: Halves, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Conventional split learning: what crosses is cut out of the graph, and the gradients are handed back."""
    crossing = halves.client(x)
    received = tuple(z.detach().requires_grad_() for z in crossing)
    logits = halves.server(*received)
    F.cross_entropy(logits, y).backward()
    torch.autograd.backward(crossing, [z.grad for z in received])
    return logits, crossing


def assert_equal_states(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_split_equals_whole(model: nn.Module, layer: str, x: Tensor) -> Halves:
    """Two training passes and one in evaluation; random numbers are drawn alike."""
    reference, halves = copy.deepcopy(model), split(model, layer)
    y = torch.arange(len(x)) % 2
    for step in range(2):
        torch.manual_seed(step)
        expected = reference(x)
        F.cross_entropy(expected, y).backward()
        torch.manual_seed(step)
        logits, _ = chain(halves, x, y)
        assert torch.equal(logits, expected)
    both = [*halves.client.named_parameters(), *halves.server.named_parameters()]
    used = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert_equal_states({n: p.grad for n, p in both}, used)
    joined = join_state(halves.client.state_dict(), halves.server.state_dict())
    unused = {n for n, p in reference.named_parameters() if p.grad is None}
    assert_equal_states(joined, {n: value for n, value in reference.state_dict().items() if n not in unused})
    for module in (reference, halves.client, halves.server):
        module.eval()
    with torch.no_grad():
        assert torch.equal(halves.server(*halves.client(x)), reference(x))
    return halves


def images(channels: int = 3, side: int = 8) -> Tensor:
    return torch.randn(4, channels, side, side, generator=torch.Generator().manual_seed(1)) + 0.5


def refusal(model: nn.Module | tuple[nn.Module, nn.Module], layer: str) -> str:
    with pytest.raises(InputError) as error:
        split(model, layer)
    return str(error.value)


# --- shipped networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["stem.0", "stage_1.0", "stage_2.0.conv_2", "stage_2.2", "stage_3", "pool"])
def test_halves_equal_the_whole_resnet(layer: str) -> None:
    model = build_model("resnet20", (3, 8, 8), 10, seed=0)
    halves = assert_split_equals_whole(model, layer, images())
    model.load_state_dict(join_state(halves.client.state_dict(), halves.server.state_dict()), strict=True)


def test_a_changed_weight_of_either_half_changes_the_logits() -> None:
    x = images()
    for side in ("client", "server"):
        halves = split(build_model("resnet20", (3, 8, 8), 10, seed=0), "stage_2.2")
        before = halves.server(*halves.client(x))
        with torch.no_grad():
            next(getattr(halves, side).parameters()).mul_(1.5)
        assert not torch.equal(halves.server(*halves.client(x)), before)


def test_the_model_and_the_random_state_are_left_alone() -> None:
    model = build_model("resnet20", (3, 8, 8), 10, seed=0).eval()
    before, random_state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    halves = split(model, "stage_2.2")
    assert not model.training
    assert not halves.client.training
    halves.client.train()(images())
    assert cut_shapes(halves.client, (3, 8, 8)) == ((32, 4, 4),)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert_equal_states(model.state_dict(), before)


def test_cut_shapes_leave_the_client_half_as_it_is() -> None:
    halves = split(build_model("resnet110", (3, 32, 32), 10, seed=0), "stage_2.7")
    before = copy.deepcopy(halves.client.state_dict())
    assert cut_shapes(halves.client, (3, 32, 32)) == ((32, 16, 16),)  # the paper's cut: 26 of 54 blocks
    assert halves.client.training
    assert_equal_states(halves.client.state_dict(), before)


def test_copies_of_halves_are_independent_and_equal() -> None:
    halves = split(build_model("resnet20", (3, 8, 8), 10, seed=0), "stage_2.2")
    client = copy.deepcopy(halves.client).eval()
    assert halves.client.training
    assert torch.equal(client(images())[0], halves.client.eval()(images())[0])
    assert not {id(t) for t in client.state_dict(keep_vars=True).values()} & {id(p) for p in halves.client.parameters()}


def test_channels_last_stays() -> None:
    halves = split(build_model("resnet20", (3, 8, 8), 10, seed=0), "stage_1.1")
    for half in (halves.client, halves.server):
        half.to(memory_format=torch.channels_last)
    (z,) = halves.client(images().to(memory_format=torch.channels_last))
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert halves.server(z).shape == (4, 10)


def test_whole_has_the_joined_state() -> None:
    model = build_model("resnet20", (3, 8, 8), 10, seed=0).eval()
    joined = whole(split(build_model("resnet20", (3, 8, 8), 10, seed=1), "stage_2.2")).eval()
    assert not torch.equal(joined(images()), model(images()))
    joined.load_state_dict(model.state_dict())
    assert torch.equal(joined(images()), model(images()))
    assert_equal_states(joined.state_dict(), model.state_dict())


# --- awkward networks -----------------------------------------------------------------------------------------------


class Base(nn.Module):
    """Layers to be used by a forward of its own: (B, 6) → (B, 2)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)


def vectors() -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(2)) + 1


class Skip(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.relu(self.b(x))
        return self.last(self.relu(self.c(y)) + x)


def test_a_skip_over_the_cut_is_carried_behind_the_layers_output() -> None:
    class Three(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)[:, :5]
            y = self.b(F.pad(x, (0, 1)))
            return self.last(self.c(y) + F.pad(x, (1, 0)))

    assert_split_equals_whole(Skip(), "b", vectors())
    halves = assert_split_equals_whole(Three(), "b", vectors())
    assert cut_shapes(halves.client, (6,)) == ((6,), (5,))


class Dropping(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.a(x), 0.5, training=self.training)
        x = F.dropout(self.b(x), p=0.5 if self.training else 0.0)
        return self.last(F.dropout(self.c(x), 0.5, self.training))


@pytest.mark.parametrize("layer", ["a", "b", "c"])
@pytest.mark.parametrize("training", [True, False])
def test_functional_dropout_follows_the_mode_of_its_half(layer: str, training: bool) -> None:
    model = Dropping().train(training)  # the mode at the time of the cut does not matter
    halves = assert_split_equals_whole(model.train(), layer, vectors())
    x = vectors()
    assert torch.equal(halves.server(*halves.client(x)), halves.server(*halves.client(x)))
    copied = copy.deepcopy(halves.server).train()
    z = halves.client(x)
    assert not torch.equal(copied(*z), copied(*z))


def test_dropout_and_batchnorm_modules_follow_each_half() -> None:
    layers = [nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)]
    halves = assert_split_equals_whole(nn.Sequential(*layers), "2", vectors())
    halves.client.train()
    assert not halves.server.training
    assert not torch.equal(halves.client(vectors())[0], halves.client(vectors())[0])


def test_a_module_without_state_may_be_in_both_halves() -> None:
    class Shared(Base):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.drop(self.b(self.drop(self.a(x)))))

    halves = assert_split_equals_whole(Shared(), "a", vectors())
    halves = split(Shared(), "b")
    halves.client.train()
    halves.server.eval()
    assert halves.client.drop.training
    assert not halves.server.drop.training


class Sizes(Base):
    def forward(self, x: Tensor) -> Tensor:
        batch, features = x.shape
        x = self.a(x)
        y = self.b(x.view(batch, 2, -1).reshape(batch, features))
        return self.last(self.c(y).view(x.size(0) * 2, -1).view(batch, y.shape[1]))


def test_sizes_from_below_the_cut_are_computed_again() -> None:
    halves = assert_split_equals_whole(Sizes(), "b", vectors())
    assert cut_shapes(halves.client, (6,)) == ((6,),)  # no tensor crosses for its size alone


def test_a_size_that_is_not_the_batch_is_refused() -> None:
    class Features(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.b(self.a(x)).view(-1, x.size(1)))

    assert refusal(Features(), "a") == (
        "model.cut 'a': expected sizes above the cut of tensors that cross it, found a size of x (size); "
        "cut at another layer, or read that size above the cut"
    )


def test_a_batch_size_read_off_a_tensor_that_is_not_batch_first_is_refused_when_it_runs() -> None:
    class Tokens(Base):
        def forward(self, x: Tensor) -> Tensor:
            halves = x.reshape(-1, 6)  # (B·2, 6)
            return self.last(self.b(self.a(x).mean(1)) + halves.size(0))

    client = split(Tokens(), "a").client
    with pytest.raises(InputError, match=r"the cut: expected 4 samples, as reshape\.size"):
        client(torch.randn(4, 2, 6))


def test_constants_and_buffers_go_where_they_are_used() -> None:
    class Constants(Base):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.full((6,), 2.0))
            self.register_buffer("shift", torch.ones(6), persistent=False)
            self.constant = torch.tensor(3.0)

        def forward(self, x: Tensor) -> Tensor:
            above = self.shift * self.constant
            y = self.a(x) * self.scale + self.shift
            return self.last(torch.flatten(self.b(y) + above, 1) * torch.tensor(0.5))

    halves = assert_split_equals_whole(Constants(), "a", vectors())
    assert halves.client.state_dict().keys() == {"a.weight", "a.bias"}
    halves = split(Constants(), "a")
    expected = Constants()(vectors())
    assert torch.equal(halves.server(*halves.client(vectors())), expected)
    assert "shift" not in halves.server.state_dict()
    assert "shift" not in copy.deepcopy(halves.server).state_dict()
    assert "scale" in halves.server.state_dict()
    assert torch.equal(copy.deepcopy(halves.server)(*copy.deepcopy(halves.client)(vectors())), expected)


def test_of_a_tuple_only_the_used_elements_cross() -> None:
    class Tuples(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.last = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.rnn(x)
            return self.last(out[:, -1])

    halves = assert_split_equals_whole(Tuples(), "rnn", torch.randn(4, 3, 6))
    assert cut_shapes(halves.client, (3, 6)) == ((3, 5),)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)])
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean(1))


@pytest.mark.parametrize(("layer", "count"), [("first", 1), ("attention", 2), ("blocks.0", 1)])
def test_transformers(layer: str, count: int) -> None:
    halves = assert_split_equals_whole(Transformer(), layer, torch.randn(4, 3, 6))
    assert cut_shapes(halves.client, (3, 6)) == ((3, 8),) * count
    assert layer_names(Transformer())[:3] == ["first", "attention", "blocks.0"]


class InPlace(Base):
    """What `a` returns is changed in place afterwards, by += and through a view, and then used by its first name."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        y = z
        y += 1
        self.relu_(z.view(-1, 6))
        return self.last(self.b(z) + z)


def test_a_crossing_tensor_that_is_changed_in_place_above_stays_as_it_is_below() -> None:
    halves = assert_split_equals_whole(InPlace(), "a", vectors())
    crossing = halves.client(vectors())
    before = crossing[0].detach().clone()
    halves.server(*(z.detach() for z in crossing))
    assert torch.equal(crossing[0], before)


class Powers(Base):
    """Other operations in place, on a view: the tensor itself changes."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        k = h.view(-1, 6)
        k **= 2
        k %= 0.7
        return self.last(self.b(h))


class Unseen(Base):
    """An operation in place that a trace does not see."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        k = h.data
        k += 1
        return self.last(self.b(h))


def unseen(sample_shape: tuple[int, ...], classes: int) -> nn.Module:
    return Unseen()


def test_what_changes_in_place_is_cut_rightly_or_not_at_all() -> None:
    model = Powers()
    assert_split_equals_whole(model, "a", vectors())
    check_same("model.cut 'a'", model, split(model, "a"), tuple(vectors().shape[1:]))
    with pytest.raises(InputError, match=r"model.cut 'a': expected halves that compute what the network does, found other outputs; take"):
        build_network(Config(model=ModelConfig("test_split:unseen", "a")), tuple(vectors().shape[1:]), 2)


class TorchvisionBlock(nn.Module):
    """As torchvision writes it: one ReLU for all, in place, and `+=`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class DenseAndSkips(nn.Module):
    """Concatenation, a skip over several layers, sizes and functional operations between them."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)])
        self.up, self.norm, self.last = nn.Conv2d(12, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = []
        for layer in self.down:
            x = F.relu(layer(x), inplace=True)
            features.append(x)
        large = F.interpolate(x, size=features[0].shape[-2:])
        x = F.relu_(self.norm(self.up(torch.cat([features[0], large], dim=1))))
        return self.last(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def test_every_cut_of_networks_that_write_in_place() -> None:
    torch.manual_seed(0)
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    blocks = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), TorchvisionBlock(), TorchvisionBlock(), *tail)
    for model, count in ((blocks, 14), (DenseAndSkips(), 4)):
        names = layer_names(model)
        assert len(names) == count, names
        for layer in names:
            assert_split_equals_whole(model, layer, images())


def test_optional_arguments_keep_their_defaults() -> None:
    class Optional(Base):
        def forward(self, x: Tensor, mask: Tensor | None = None, twice: bool = True) -> Tensor:
            x = self.b(self.a(x))
            x = x if mask is None else x * mask
            return self.last(self.c(x) * 2 if twice else x)

    assert_split_equals_whole(Optional(), "b", vectors())


# --- refusals -------------------------------------------------------------------------------------------------------


class KeptInEvaluation(nn.Module):
    """BatchNorm's statistics stay as they are while it trains, as in fine-tuning; a trace would lose that."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def train(self, mode: bool = True) -> "KeptInEvaluation":
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.a(x)))


def test_modules_that_do_not_follow_train_are_refused() -> None:
    text = refusal(KeptInEvaluation(), "norm")
    assert text.startswith("model KeptInEvaluation: expected modules that follow train() and eval(), found norm in evaluation mode behind train(True); take")


def test_weights_that_both_halves_use_are_refused_by_name() -> None:
    class Twice(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.a(self.b(self.a(x))))

    hint = "cut where all its uses are on one side, or give the two halves: --model.name module:function that returns"
    text = refusal(Twice(), "b")
    assert text.startswith("model.cut 'b': expected weights and buffers that one half uses, found 'a.weight' used by")
    assert hint in text
    model = Base()
    tied = nn.Sequential(model.a, model.b, model.c, model.last)
    model.c.weight = model.a.weight
    assert "'2.weight' used by both halves (on the client as '0.weight')" in refusal(tied, "1")


def test_control_flow_on_values_is_refused_with_the_way_out() -> None:
    class Branch(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.last(x) if x.sum() > 0 else self.last(-x)

    assert refusal(Branch(), "a") == (
        "model Branch: expected a forward that can be traced, found TraceError: symbolically traced variables cannot "
        "be used as inputs to control flow; take what depends on values out of forward, or give the two halves: "
        "--model.name module:function that returns (client half, server half)"
    )


def test_what_a_trace_would_lose_is_refused() -> None:
    class ByMode(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.last(self.b(x) if self.training else x)

    class Random(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.a(x) * torch.rand(6))

    class Frozen(Base):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.a(x)
            return self.last(self.b(x))

    start = "expected one order of operations in every pass, in training and in evaluation, found "
    assert start in refusal(ByMode(), "a")
    assert start + "a tensor made in forward" in refusal(Random(), "a")
    assert "`with torch.no_grad()` or `torch.autocast` inside forward would be lost" in refusal(Frozen(), "b")


def test_raw_input_never_crosses() -> None:
    class Raw(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.b(self.a(x)) + (x if self.through is None else self.through(x)))

    model = Raw()
    model.through = None
    end = "used above the cut; cut at another layer: the data itself must not cross"
    learned = "expected values that the client half has learned, found the raw input"
    assert refusal(model, "a") == f"model.cut 'a': {learned}, {end}"
    assert refusal(nn.Sequential(nn.Flatten(), nn.Linear(6, 2)), "0").endswith(f"the raw input through _0 alone, {end}")


def test_wrong_names_list_the_near_ones() -> None:
    model = build_model("resnet20", (3, 8, 8), 10, seed=0)
    assert refusal(model, "stage_2.9") == (
        "model.cut 'stage_2.9': expected the name of a layer, found no such layer; "
        "did you mean 'stage_2.2'?"
    )
    assert "found no such layer; for instance stem.0, stem.1" in refusal(model, "")
    uncalled = "found a module that forward does not call by itself; did you mean"
    assert f"{uncalled} 'attention'?" in refusal(Transformer(), "attention.out_proj")
    assert f"{uncalled} 'blocks.1'?" in refusal(Transformer(), "blocks")


def test_a_half_with_nothing_to_train_is_refused() -> None:
    model = Skip()
    assert refusal(model, "last") == (
        "model.cut 'last': expected a server half with something to train, found no trainable parameter in it; "
        "cut earlier, or freeze less"
    )
    model.a.requires_grad_(False)
    model.b.requires_grad_(False)
    halves = split(model, "b")  # a frozen client half is one: its head and the server half train
    assert not any(parameter.requires_grad for parameter in halves.client.parameters())


def test_an_output_that_nothing_uses_is_refused() -> None:
    class Aside(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            self.b(x)
            return self.last(x)

    text = "model.cut 'b': expected an output that is used above the cut, found one that is not; cut at another layer"
    assert refusal(Aside(), "b") == text


def test_values_that_are_not_floats_per_sample_are_refused_when_measured() -> None:
    class Index(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            order = x.argsort(1)
            return self.last(self.b(x).gather(1, order))

    client = split(Index(), "b").client
    with pytest.raises(InputError) as error:
        cut_shapes(client, (6,))
    assert str(error.value) == (
        "value 1 that crosses the cut: expected floats of shape (B, ...), found (2, 6) of torch.int64 for 2 samples; "
        "cut at another layer"
    )
    with pytest.raises(InputError, match="the client half: expected a forward pass of"):
        cut_shapes(client, (7,))


# --- two halves given directly --------------------------------------------------------------------------------------


def test_a_pair_lets_nothing_cross_but_what_its_client_half_returns() -> None:
    with pytest.raises(InputError) as refused:
        split((nn.Linear(6, 5), nn.Linear(5, 2)), "", vectors(), may_cross=["edges"])
    assert str(refused.value) == (
        "model.may_cross: expected none with two halves that are given, found 'edges'; let the client half return what is to cross"
    )


def test_a_pair_is_taken_as_it_is() -> None:
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), nn.Linear(5, 2)
    halves = split(pair, "")
    assert cut_shapes(halves.client, (6,)) == ((5,),)
    logits, _ = chain(halves, vectors(), torch.arange(4) % 2)
    assert torch.equal(logits, pair[1](pair[0](vectors())))  # in training mode: the statistics move alike
    state = join_state(halves.client.state_dict(), halves.server.state_dict())
    assert {"client.0.weight", "server.weight"} < state.keys()
    joined = whole(halves).eval()
    joined.load_state_dict(state, strict=True)
    assert torch.equal(joined(vectors()), pair[1](pair[0].eval()(vectors())))
    assert refusal(pair, "0") == (
        "model.cut '0': expected no layer (\"\") for two halves that are given, found '0'; leave model.cut empty"
    )
    assert "'server.weight' used by both halves (on the client as 'client.weight')" in refusal((pair[1], pair[1]), "")


def test_joining_halves_that_overlap_is_refused() -> None:
    halves = split(Skip(), "b")
    with pytest.raises(InputError, match=r"joining the halves: .* found 'a.bias' in both"):
        join_state(halves.client.state_dict(), halves.client.state_dict())


# --- every possible cut ---------------------------------------------------------------------------------------------


def test_layer_names_are_distinct_cuts_by_their_outermost_name() -> None:
    names = layer_names(build_model("digits-cnn", (1, 8, 8), 10, seed=0))
    assert names[:4] == ["block_1.0", "block_1.1", "block_1", "block_2.0"]
    assert "classifier" not in names
    model = Skip()
    for name in layer_names(model):
        assert_split_equals_whole(model, name, vectors())


def test_the_cut_table_agrees_with_the_halves() -> None:
    model = build_model("resnet20", (3, 16, 16), 10, seed=0)
    rows = {name: row for row in cut_table("resnet20", (3, 16, 16), 10, "linear") for name in (row.layer, *row.also)}
    for layer in ("stem", "stage_2.0.conv_1", "stage_2.2", "pool"):
        row, halves = rows[layer], split(model, layer)
        assert row.activation_shapes == cut_shapes(halves.client, (3, 16, 16))
        assert row.activation_bytes_per_sample == 4 * sum(z[0].numel() for z in halves.client(torch.ones(1, 3, 16, 16)))
        assert row.client_parameters == sum(p.numel() for p in halves.client.parameters())
        assert row.server_parameters == sum(p.numel() for p in halves.server.parameters())
    assert rows["stem"].client_flops == 2 * 16 * 16 * 16 * 3 * 9  # one 3×3 convolution, by hand
    assert rows["pool"].server_flops == 2 * 64 * 10
    assert rows["stage_2.2"].head_parameters == 32 * 8 * 8 * 10 + 10
    assert rows["stage_2.2"].head_flops == 2 * 32 * 8 * 8 * 10
    assert len({row.client_flops + row.server_flops for row in rows.values()}) == 1


def test_the_cut_table_of_a_network_at_hand_is_that_of_its_name_and_leaves_it_as_it_is() -> None:
    model = build_model("digits-cnn", (1, 8, 8), 10, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert cut_table(model, (1, 8, 8), 10) == cut_table("digits-cnn", (1, 8, 8), 10, "linear")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match=r"^network Linear: expected a forward pass of "):
        cut_table(nn.Linear(3, 4), (8,), 4)


def test_the_cut_table_marks_a_head_that_does_not_fit() -> None:
    rows = cut_table("digits-cnn", (1, 8, 8), 10, "conv")
    assert rows[-1].layer == "pool"
    assert rows[-1].head_parameters is None
    assert rows[0].head_parameters is not None
