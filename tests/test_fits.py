"""halfpass's steps in a loop of Lightning Fabric or Accelerate, and collators of transformers: beside the plain way."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import halfpass
from halfpass import client_steps, server_steps
from halfpass.data.batches import train_batches
from halfpass.data.own import from_datasets
from halfpass.errors import InputError

DRAWS = torch.Generator().manual_seed(5)
X, Y = torch.randn(96, 8, generator=DRAWS), torch.randint(0, 3, (96,), generator=DRAWS)
BATCH = 32


def parts():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), nn.Linear(16, 3)


def plain(*, bf16=False):
    """One module, `detach()` at the cut, both losses: the weights after two epochs."""
    model, head = parts()
    own = torch.optim.Adam([*model[:2].parameters(), *head.parameters()], lr=0.01)
    above = torch.optim.Adam(model[2].parameters(), lr=0.01)
    for x, y in 2 * [*zip(X.split(BATCH), Y.split(BATCH), strict=True)]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            z = model[:2](x)
            local, true = head(z), model[2](z.detach())
        (cross_entropy(local.float(), y) + cross_entropy(true.float(), y)).backward()
        for optimizer in (own, above):
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


def sides():
    model, head = parts()
    halves = halfpass.split(model, "1", X[:8])
    own = torch.optim.Adam([*halves.client.parameters(), *head.parameters()], lr=0.01)
    return halves, head, own, torch.optim.Adam(halves.server.parameters(), lr=0.01)


def learn(client, server, *, micro=BATCH):
    """Two epochs, each batch in parts of `micro` samples: the weights of both halves."""
    wire = halfpass.Loopback("none")
    for epoch in range(2):
        for step, (x, y) in enumerate(zip(X.split(BATCH), Y.split(BATCH), strict=True)):
            for i in range(0, len(x), micro):
                place = {"epoch": epoch, "step": step, "before": i, "after": max(0, len(x) - i - micro)}
                batch, _ = client_steps.decoupled_step(client, x[i : i + micro], y[i : i + micro], **place)
                server_steps.decoupled_step(server, wire.send(batch))
    return halfpass.join_state(client.half.state_dict(), server.half.state_dict())


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def close(one, other):
    return all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_without_a_library_the_weights_are_those_of_the_plain_way():
    halves, head, own, above = sides()
    assert equal(learn(halfpass.Client(halves.client, head, own), halfpass.Server(halves.server, above)), plain())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric(precision):
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1, precision=precision)
    halves, head, own, above = sides()
    half, own = fabric.setup(halves.client, own)
    top, above = fabric.setup(halves.server, above)
    client = halfpass.Client(half, fabric.setup_module(head), own, backward=fabric.backward)
    found = learn(client, halfpass.Server(top, above, backward=fabric.backward))
    assert equal(found, plain(bf16=precision == "bf16-mixed"))
    assert not equal(found, plain(bf16=precision != "bf16-mixed"))


@pytest.fixture
def accelerate():
    library = pytest.importorskip("accelerate")
    _forget(library)  # what other tests in this process have set
    yield library
    _forget(library)


def _forget(library):
    library.state.AcceleratorState._reset_state(reset_partial_state=True)
    library.state.GradientState._reset_state()


def accelerated(accelerator):
    halves, head, own, above = sides()
    half, head, own, top, above = accelerator.prepare(halves.client, head, own, halves.server, above)
    client = halfpass.Client(half, head, own, backward=accelerator.backward)
    return client, halfpass.Server(top, above, backward=accelerator.backward)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision, accelerate):
    found = learn(*accelerated(accelerate.Accelerator(cpu=True, mixed_precision=precision)))
    assert equal(found, plain(bf16=precision == "bf16"))
    assert not equal(found, plain(bf16=precision != "bf16"))


def test_parts_of_a_batch_add_up_to_its_gradient_under_accelerate(accelerate):
    found = learn(*accelerated(accelerate.Accelerator(cpu=True)), micro=8)
    assert close(found, plain())


def test_accelerates_own_accumulation_is_refused_because_gradients_would_be_lost(accelerate):
    client, server = accelerated(accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4))
    remedy = "give parts of a batch instead, by before= and after="
    expected = "expected an optimizer that makes every step, found Accelerate's, with gradient_accumulation_steps=4"
    with pytest.raises(InputError) as refused:
        client_steps.decoupled_step(client, X[:8], Y[:8], epoch=0, step=0)
    assert str(refused.value) == f"client.optimizer: {expected}; {remedy}"
    batch, _ = client_steps.decoupled_step(
        halfpass.Client(client.half, client.head, client.optimizer.optimizer), X[:8], Y[:8], epoch=0, step=0
    )
    with pytest.raises(InputError, match=r"^server\.optimizer: expected an optimizer that makes every step"):
        server_steps.decoupled_step(server, batch)


def run_page(name):
    """The code of a page of docs/how-to, from top to bottom."""
    page = (Path(__file__).parent.parent / "docs" / "how-to" / f"{name}.md").read_text()
    names = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    assert names["step"] > 0
    assert torch.isfinite(torch.tensor([names["local_loss"], names["loss"]])).all()


def test_the_page_about_fabric_runs():
    pytest.importorskip("lightning_fabric")
    run_page("fits-lightning")


def test_the_page_about_accelerate_runs(accelerate):
    run_page("fits-accelerate")


def test_the_page_about_hugging_face_runs():
    pytest.importorskip("datasets")  # 60 MB, which the tests do not install
    run_page("fits-hugging-face")


# --- Collators --------------------------------------------------------------------------------------------------------


class Sentences:
    """Rows of token numbers, of different lengths, and what they are about; as a tokenizer makes them."""

    def __init__(self, collate=None):
        self.collate = collate

    def __len__(self):
        return 40

    def __getitem__(self, i):
        ids = [2 + (3 * i + j) % 10 for j in range(1 + i % 5)]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": i % 2}


class Words(nn.Module):
    """Counts any number of tokens; cut behind `mix`."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.answer = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def below(self, input_ids):  # (B, T) → (B, T, 8)
        return self.mix(self.embed(input_ids))

    def above(self, z, attention_mask):
        return self.answer((z * attention_mask.unsqueeze(-1)).sum(1))

    def forward(self, input_ids, attention_mask):
        return self.above(self.below(input_ids), attention_mask)


class Mean(nn.Linear):
    def forward(self, z):  # (B, T, 8) → (B, 2)
        return super().forward(z.mean(1))


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[PAD]", "[MASK]", *"abcdefghij"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", mask_token="[MASK]")


def test_a_collator_pads_the_samples_of_a_run(tokenizer):
    from transformers import DataCollatorWithPadding

    collate = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=6)
    data = from_datasets("sentences", Sentences(collate), Sentences(collate))
    expected = collate([Sentences()[i] for i in range(40)])
    assert torch.equal(data.train.inputs["input_ids"], expected["input_ids"])
    assert torch.equal(data.train.inputs["attention_mask"], expected["attention_mask"])
    assert torch.equal(data.train.labels, expected["labels"])
    assert (data.train.inputs["input_ids"][0] == 0).sum() == 5  # the padding


def test_a_collator_that_draws_draws_for_each_sample_and_epoch_anew(tokenizer):
    from transformers import DataCollatorForLanguageModeling

    class Texts(Sentences):
        def __getitem__(self, i):
            return {"input_ids": [2 + (i + j) % 10 for j in range(8)]}

    collate = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.5)
    data = from_datasets("texts", Texts(collate), Texts(collate))
    assert data.train.targets.shape == (40, 8)
    epochs = [
        list(train_batches(data, data.train, 20, seed=0, client=0, epoch=epoch)) for epoch in (0, 1, 0)
    ]
    first, second, again = ([y for _, y in epoch] for epoch in epochs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_collator_that_pads_to_the_longest_is_refused_in_a_run(tokenizer):
    from transformers import DataCollatorWithPadding

    collate = DataCollatorWithPadding(tokenizer)
    with pytest.raises(InputError) as refused:
        from_datasets("sentences", Sentences(collate), Sentences(collate))
    assert str(refused.value) == (
        "data sentences, train, sample 1: expected {input_ids: int64 (1,), attention_mask: int64 (1,)} like the first, "
        "found {input_ids: int64 (2,), attention_mask: int64 (2,)}; pad all to one length in collate"
    )


def test_what_is_no_batch_of_one_is_refused():
    with pytest.raises(InputError) as refused:
        from_datasets("odd", Sentences(lambda items: {"a": torch.zeros(3, 2), "labels": 1}), Sentences())
    expected = "expected tensors of one sample, of one item, found (3, 2); put the samples first"
    assert str(refused.value) == f"data odd, train, sample 0, collate: {expected}"


def test_torchs_own_collator_of_pairs_changes_nothing():
    class Pairs(Sentences):
        def __getitem__(self, i):
            return X[i], Y[i]

    data = from_datasets("pairs", Pairs(torch.utils.data.default_collate), Pairs())
    assert torch.equal(data.train.inputs, X[:40])
    assert torch.equal(data.train.labels, Y[:40])


def test_a_loop_of_ones_own_pads_each_batch_to_its_longest(tokenizer):
    """Batches of different lengths through a replayed cut, beside one module with `detach()`."""
    from transformers import DataCollatorWithPadding

    batches = [dict(batch) for batch in DataLoader(Sentences(), 4, collate_fn=DataCollatorWithPadding(tokenizer))]
    batches = [(batch, batch.pop("labels")) for batch in batches]
    assert len({x["input_ids"].shape[1] for x, _ in batches}) > 1

    def fresh():
        torch.manual_seed(3)
        return Words(), Mean(8, 2)

    model, head = fresh()
    own = torch.optim.SGD([*model.embed.parameters(), *model.mix.parameters(), *head.parameters()], lr=0.1)
    above = torch.optim.SGD(model.answer.parameters(), lr=0.1)
    for x, y in batches:
        z = model.below(x["input_ids"])
        (cross_entropy(head(z), y) + cross_entropy(model.above(z.detach(), x["attention_mask"]), y)).backward()
        for optimizer in (own, above):
            optimizer.step()
            optimizer.zero_grad()

    ours, head = fresh()
    halves = halfpass.split(ours, "mix", batches[1][0], may_cross=["attention_mask"])
    own = torch.optim.SGD([*halves.client.parameters(), *head.parameters()], lr=0.1)
    client = halfpass.Client(halves.client, head, own)
    server = halfpass.Server(halves.server, torch.optim.SGD(halves.server.parameters(), lr=0.1))
    wire = halfpass.Loopback("none")
    for step, (x, y) in enumerate(batches):
        batch, _ = client_steps.decoupled_step(client, x, y, epoch=0, step=step)
        server_steps.decoupled_step(server, wire.send(batch))
    assert equal(halfpass.join_state(halves.client.state_dict(), halves.server.state_dict()), model.state_dict())
