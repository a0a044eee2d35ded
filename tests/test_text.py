"""Text through the same paths as pictures: the generated corpus, and the transformer cut after any block."""

import pytest
import torch

from halfpass.config import Config, DataConfig, ModelConfig, TrainConfig, WireConfig
from halfpass.data.datasets import load
from halfpass.data.listops import LENGTH
from halfpass.errors import InputError
from halfpass.networks.cut_table import cut_table
from halfpass.networks.models import build_model
from halfpass.networks.split import cut_shapes, split
from halfpass.run import setup
from halfpass.run.train import train


def value_of(text):
    """The plain way: innermost operation first, until a digit is left."""
    while len(text) > 1:
        begin = text.rindex("[")
        end = text.index("]", begin)
        sign, digits = text[begin + 1], sorted(map(int, text[begin + 2 : end]))
        value = {">": digits[-1], "<": digits[0], "~": digits[(len(digits) - 1) // 2], "+": sum(digits) % 10}[sign]
        text = f"{text[:begin]}{value}{text[end + 1 :]}"
    return int(text)


def test_every_text_of_listops_has_the_value_that_its_label_says():
    data = load("listops")
    texts = [bytes(row.byte().tolist()).decode().rstrip() for part in (data.train, data.test) for row in part.inputs]
    labels = torch.cat([data.train.labels, data.test.labels]).tolist()
    assert (len(data.train), len(data.test), data.train.sample_shape) == (20_000, 2_000, (LENGTH,))
    assert [value_of(text) for text in texts] == labels
    assert len(set(texts)) == 22_000  # so no test text is trained on
    assert max(map(len, texts)) == LENGTH
    assert sum(text.count("[") > 1 for text in texts) > 11_000
    assert max(labels.count(value) for value in range(10)) < 0.2 * len(labels)  # so a constant answer is worth little
    assert torch.equal(load("listops").train.inputs, data.train.inputs)


@pytest.mark.parametrize("cut", ["embedding", "blocks.0", "blocks.3", "pool"])
def test_the_transformer_is_the_same_cut_anywhere(cut):
    model = build_model("transformer", (LENGTH,), 10, seed=0).eval()
    halves = split(build_model("transformer", (LENGTH,), 10, seed=0), cut)
    x = load("listops", limit=16).test.inputs.float()
    assert torch.equal(halves.server.eval()(*halves.client.eval()(x)), model(x))
    assert not torch.allclose(model(x), model(x.flip(1)))  # it sees the order
    assert cut_shapes(halves.client, (LENGTH,)) == (((64,),) if cut == "pool" else ((LENGTH, 64),))


def test_the_cost_of_a_block_counts_attention():
    costs = {row.layer: row for row in cut_table("transformer", (LENGTH,), 10, "linear")}
    block = costs["blocks.1"].client_flops - costs["blocks.0"].client_flops
    assert block == 2 * LENGTH * 12 * 64**2 + 2 * 2 * LENGTH**2 * 64  # layers, by hand; queries, keys and values


def test_pictures_are_refused_by_the_transformer():
    with pytest.raises(InputError, match=r"expected samples of \(bytes,\), found samples of shape \(1, 8, 8\)"):
        build_model("transformer", (1, 8, 8), 10, seed=0)


def test_tokens_beyond_its_bytes_are_refused():
    data, settings = load("listops", limit=200), Config(model=ModelConfig("transformer", "blocks.0"))
    assert len(setup.make_shards(settings, data)) == 1
    data.test.inputs[3, 4] = 256
    with pytest.raises(InputError, match="expected tokens from 0 to 255 for the transformer, found 256; give a network"):
        setup.make_shards(settings, data)


def test_text_is_learned_by_both_halves(tmp_path):
    """Above what one constant answer gives, 18 %; int8 takes its scales from the last dimension."""
    outcome = train(Config(
        out=str(tmp_path), data=DataConfig("listops", limit=1000), model=ModelConfig("transformer", "blocks.0"),
        train=TrainConfig(epochs=3, test_every=3, batch_size=50, optimizer="adamw", lr=2e-3, threads=1), wire=WireConfig(codec="int8"),
    ))  # fmt: skip
    assert outcome["test_accuracy"] > 0.25
    assert outcome["aux_test_accuracy"] > 0.25
    assert outcome["bytes"]["up"]["activations"] < 3 * 1000 * 32 * 64 * 1.02  # a byte for each value
