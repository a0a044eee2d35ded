"""ONNX of halves and joined networks gives what PyTorch gives; state dicts load into the user's own network."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_predict import OF_PAIRS, OfPairs, pairs, trained
from torch import nn

import halfpass
from halfpass.commands import to_onnx
from halfpass.commands.export import export
from halfpass.config import DataConfig, ModelConfig
from halfpass.data.datasets import load as load_data
from halfpass.errors import InputError
from halfpass.networks.models import DigitsCNN

onnx, onnxruntime = (pytest.importorskip(name, reason="halfpass[onnx] is not installed") for name in ("onnx", "onnxruntime"))


class Loud(nn.Module):
    """Draws in evaluation too."""

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU()), nn.Linear(8, 10)

    def forward(self, x):
        return self.high(self.low(x) + (0 * torch.rand(8) if self.training else 1e-9 * torch.rand(8)))


def loud(shape, outputs):
    return Loud()


class Reading(nn.Module):
    """Goes another way by its data."""

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU()), nn.Linear(8, 10)

    def forward(self, x):
        h = self.low(x * 2 if x.sum() > 1e9 else x)
        return self.high(h)


def reading(shape, outputs):
    return Reading()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    trained(folder / "digits")
    trained(folder / "chain", model=ModelConfig(edge_cut="block_3"))
    trained(folder / "pairs", **OF_PAIRS)
    return folder


def run(file, **given):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return dict(zip([each.name for each in session.get_outputs()], session.run(None, given), strict=True)), session


def close(one, other):
    return np.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_head", [False, True])
def test_halves_one_after_the_other_are_the_joined_network(runs, tmp_path, with_head):
    exported = export(runs / "digits", out=tmp_path, form="onnx", with_head=with_head)
    assert "compared with PyTorch on 48 samples of the test set" in exported.remark
    pixels = load_data("digits", limit=48).test.inputs
    predictor = halfpass.load(runs / "digits")
    for count in (1, 7):
        (x,) = predictor.feeding.batches(pixels[:count], 64)
        below, session = run(tmp_path / "client_half.onnx", input=x.numpy())
        assert list(below) == ["cut.0"]
        assert session.get_inputs()[0].shape == ["batch", 1, 8, 8]
        above, _ = run(tmp_path / "server_half.onnx", **below)
        joined, _ = run(tmp_path / "joined.onnx", input=x.numpy())
        answers = predictor.predict(pixels[:count]).answers.numpy()
        assert close(torch.from_numpy(above["output"]).softmax(1), answers)
        if with_head:
            head, _ = run(tmp_path / "auxiliary_head.onnx", **below)
            mean = (torch.from_numpy(head["output"]).softmax(1).numpy() + answers) / 2
            assert close(joined["probabilities"], mean)
        else:
            assert close(torch.from_numpy(joined["output"]).softmax(1), answers)
    said = {prop.key: prop.value for prop in onnx.load(tmp_path / "joined.onnx").metadata_props}
    assert json.loads(said["halfpass"])["mean"] == list(predictor.feeding.mean)
    assert json.loads((tmp_path / "signature.json").read_text())["raw_inputs"] == {"": ["uint8", [1, 8, 8]]}
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".part")]


def test_three_parts_of_a_chain(runs, tmp_path):
    export(runs / "chain", out=tmp_path, form="onnx")
    x = np.zeros((3, 1, 8, 8), np.float32)
    below, _ = run(tmp_path / "client_half.onnx", input=x)
    between, _ = run(tmp_path / "edge_half.onnx", **below)
    assert list(between) == ["edge_cut.0"]
    above, _ = run(tmp_path / "server_half.onnx", **between)
    joined, _ = run(tmp_path / "joined.onnx", input=x)
    assert close(above["output"], joined["output"])


def test_several_inputs_and_outputs_have_their_names(runs, tmp_path):
    """A network that is replayed, not traced by torch.fx."""
    export(runs / "pairs", out=tmp_path, form="onnx")
    data, model = pairs()[1], OfPairs().eval()
    export(runs / "pairs", out=tmp_path / "m.pt", form="state")
    model.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    for count in (1, 20):
        given = {"a": data.a[:count].numpy(), "b": data.b[:count].numpy()}
        expected = model(data.a[:count], data.b[:count])
        joined, _ = run(tmp_path / "joined.onnx", **given)
        below, _ = run(tmp_path / "client_half.onnx", **given)
        above, session = run(tmp_path / "server_half.onnx", **{name: below[name] for name in below})
        assert {each.name for each in session.get_inputs()} == set(below)
        for made in (joined, above):
            assert list(made) == ["output.logits", "output.norm"]
            assert close(made["output.logits"], expected["logits"].detach())


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    digits = DataConfig("digits", limit=48)
    for name, text in (("reading", "found one whose Python reads values of the data"), ("loud", "draws nothing in evaluation, found Random")):
        trained(tmp_path / name, data=digits, model=ModelConfig(f"test_onnx:{name}", "low"))
        with pytest.raises(InputError, match=rf"--format onnx.*{text}"):
            export(tmp_path / name, form="onnx")
        assert not list(tmp_path.glob(f"{name}/onnx/*"))
    with pytest.raises(InputError, match="--format: expected one of safetensors, state, onnx, found 'onyx'; did you mean 'onnx'"):
        export(tmp_path / "reading", form="onyx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=re.escape("expected onnxruntime to be installed") + ".*pip install 'halfpass"):
        export(tmp_path / "loud", form="onnx")


class Baked(nn.Module):
    """A trace takes its batch size for a constant."""

    def forward(self, x):
        return x.reshape(int(x.shape[0]), -1) if x.shape[0] == 5 else x.flatten(1)


class Off(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *tensors):
        return tuple(tensor + 0.01 for tensor in self.module(*tensors))


def test_a_graph_that_computes_something_else_is_refused(runs, tmp_path, monkeypatch):
    signature = halfpass.load(runs / "digits").signature
    piece = to_onnx.Piece("joined", Baked(), {"input": torch.rand(9, 1, 8, 8)})
    with pytest.raises(InputError, match=r"joined: expected (a graph that onnxruntime runs|PyTorch's outputs)"):
        to_onnx._write(piece, tmp_path / "x.onnx", signature)
    trace = to_onnx._trace
    monkeypatch.setattr(to_onnx, "_trace", lambda place, flat, *rest: trace(place, Off(flat), *rest))
    piece = to_onnx.Piece("joined", nn.Linear(4, 3), {"input": torch.rand(9, 4)})
    with pytest.raises(InputError, match=r"PyTorch's outputs to 0.0001 of the largest, with 1 samples, found .* apart"):
        to_onnx._write(piece, tmp_path / "x.onnx", signature)


@pytest.mark.parametrize("form", ["state", "safetensors"])
def test_weights_load_strictly_into_the_users_own_network(runs, tmp_path, form):
    file = tmp_path / f"m.{form}"
    exported = export(runs / "digits", out=file, form=form)
    assert exported.accuracy == exported.reported
    state = torch.load(file, weights_only=True) if form == "state" else load_file(file)
    model = DigitsCNN(1, 10)
    model.load_state_dict(state, strict=True)
    beside = json.loads(file.with_suffix(".json").read_text())
    pixels = load_data("digits", limit=48).test.inputs
    x = (pixels.float() / 255 - beside["mean"][0]) / beside["std"][0]  # as the file says, without halfpass
    expected = halfpass.load(runs / "digits").predict(pixels).answers
    assert torch.allclose(model.eval()(x).softmax(1), expected, atol=1e-5)
    bare = model.eval()(pixels.float() / 255).softmax(1)
    assert not torch.allclose(bare, expected, atol=1e-2)
