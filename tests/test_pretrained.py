"""Weights by name, frozen parts, networks of other libraries; what both sides have loaded is agreed on at joining."""

import dataclasses
import json
import sys
import types
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from small import config, run
from torch import nn

from halfpass.config import LIBRARIES, Config, ModelConfig, named_code
from halfpass.errors import InputError
from halfpass.networks import pretrained
from halfpass.networks.models import build_model
from halfpass.networks.pretrained import digest, freeze, load_weights
from halfpass.run import setup
from halfpass.run.admission import Admission
from halfpass.run.client_process import WEIGHTS
from halfpass.run.network import build_network
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.messages import PROTOCOL


def network(seed=0):
    return build_model("digits-cnn", (1, 8, 8), 10, seed)


def test_weights_are_loaded_by_name_and_what_does_not_match_is_said(tmp_path):
    state = network(1).state_dict()
    state["classifier.weight"] = state["classifier.weight"][:5].clone()
    state["extra"] = torch.zeros(2)
    del state["block_1.0.weight"]
    for file in (tmp_path / "some.safetensors", tmp_path / "some.pt"):
        save_file(state, file) if file.suffix == ".safetensors" else torch.save({"state_dict": state}, file)
        model = network(0)
        loaded, notes = load_weights("model.weights", model, str(file))
        assert torch.equal(model.block_2[0].weight, network(1).block_2[0].weight)
        assert torch.equal(model.block_1[0].weight, network(0).block_1[0].weight)
        assert "block_2.0.weight" in loaded
        assert notes == [
            f"model.weights {file}: 1 of another shape: classifier.weight",
            f"model.weights {file}: 1 not in the file: block_1.0.weight",
            f"model.weights {file}: 1 not in the network: extra",
        ]


class Anything:
    """No tensor."""


def test_files_that_hold_no_weights_of_the_network_are_refused(tmp_path):
    def message(file):
        with pytest.raises(InputError) as caught:
            load_weights("model.weights", network(), str(file))
        return str(caught.value)

    assert message(tmp_path / "none.pt") == (
        f"model.weights: expected a file of weights, found none at {tmp_path / 'none.pt'}; check the path"
    )
    torch.save({"other.weight": torch.zeros(1)}, tmp_path / "other.pt")
    assert "expected weights of the network, such as 'block_1.0.weight', found 1 other names, such as 'other.weight'" in message(tmp_path / "other.pt")
    torch.save(Anything(), tmp_path / "any.pt")
    assert "expected safetensors, or PyTorch's tensors alone, found UnpicklingError" in message(tmp_path / "any.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"\x10")
    assert "expected safetensors, or PyTorch's tensors alone, found SafetensorError" in message(tmp_path / "broken.safetensors")
    load_weights("model.weights", network(), _saved(tmp_path, network(1)))


def test_compressed_archives_are_refused_before_they_are_read(tmp_path):
    saved = tmp_path / "some.pt"
    torch.save({"classifier.weight": torch.zeros(10, 100)}, saved)
    with zipfile.ZipFile(saved) as plain:
        parts = {part.filename: plain.read(part) for part in plain.infolist()}
    for kind, name in ((zipfile.ZIP_DEFLATED, "small.pt"), (zipfile.ZIP_STORED, "plain.pt")):
        with zipfile.ZipFile(tmp_path / name, "w", kind) as made:
            for part, content in parts.items():
                made.writestr(part, content)
    small = tmp_path / "small.pt"
    with pytest.raises(InputError) as refused:
        load_weights("model.weights", network(), str(small))
    assert str(refused.value) == (
        f"model.weights {small}: expected at most its own {small.stat().st_size} bytes in it, "
        "found compressed or overlapping parts; save it with torch.save, or as safetensors"
    )
    with pytest.raises(InputError, match="expected weights of the network"):  # it was read
        load_weights("model.weights", network(), str(tmp_path / "plain.pt"))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("change", "said"), [
    (lambda value: value.long(), "expected floating point, found integers; see what the file was made of"),
    (lambda value: value * float("nan"), "expected finite values of torch.float32, found NaN or infinity; take weights of a training that went well"),
    (lambda value: value.double() * 1e300, "expected finite values of torch.float32, found NaN or infinity; take weights of a training that went well"),
    (lambda value: torch.empty(value.shape, device="meta"), "expected values, found a meta tensor, which has none; save it from where it was trained"),
    (lambda value: torch.nested.nested_tensor([value, value[:2]]), "expected a dense tensor, found a nested tensor; save it as .to_dense()"),
    (lambda value: torch.zeros(10, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "expected values that convert to torch.float32, found torch.float4_e2m1fn_x2; save it in the network's own type"),
    (lambda value: value.to_sparse(), "expected a dense tensor, found torch.sparse_coo; save it as .to_dense()"),
])  # fmt: skip
def test_weights_that_would_become_others_are_refused(tmp_path, change, said):
    state = network(1).state_dict()
    state["classifier.bias"] = change(state["classifier.bias"] + 1)
    torch.save(state, tmp_path / "some.pt")
    model = network(0)
    with pytest.raises(InputError) as refused:
        load_weights("model.weights", model, str(tmp_path / "some.pt"))
    assert str(refused.value) == f"model.weights {tmp_path / 'some.pt'}, 'classifier.bias': {said}"
    assert torch.equal(model.classifier.weight, network(0).classifier.weight)


@pytest.mark.parametrize("change", [
    lambda value: value.to(torch.float8_e4m3fn), lambda value: value.bfloat16(), lambda value: nn.Parameter(value),
    lambda value: value[:1].expand(10), lambda value: torch.complex(value, -value).conj().imag,
])  # fmt: skip
def test_weights_of_other_types_load_if_their_values_do(tmp_path, change):
    state = network(1).state_dict()
    state["classifier.bias"] = change(torch.arange(10.0))
    torch.save(state, tmp_path / "some.pt")
    model = network(0)
    loaded, _ = load_weights("model.weights", model, str(tmp_path / "some.pt"))
    assert torch.equal(model.classifier.bias, state["classifier.bias"].float())
    assert digest(loaded, model) is not None


def test_no_pattern_freezes_nothing_by_mistake():
    with pytest.raises(InputError) as refused:
        freeze("model.freeze", network(), " , ")
    assert str(refused.value) == "model.freeze: expected patterns of names, separated by commas, found ' , '; leave it out to freeze none"


def _saved(folder, model):
    save_file(model.state_dict(), folder / "w.safetensors")
    return str(folder / "w.safetensors")


def test_freezing_by_patterns():
    model = network()
    freeze("model.freeze", model, "block_1, *.bias")
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("block_1.") or name.endswith("bias")}
    with pytest.raises(InputError, match=r"model.freeze: expected parameters such as block_1.0.weight, .* found none that matches 'blok_1'"):
        freeze("model.freeze", model, "blok_1")


def frozen_config(method, head):
    settings = config(method, model="digits-cnn", cut="block_2")
    return dataclasses.replace(settings, model=ModelConfig("digits-cnn", "block_2", head, freeze="block_1.*,block_2.*"))


@pytest.mark.parametrize(("method", "head"), [("decoupled", "linear"), ("decoupled", "none"), ("conventional", "linear")])
def test_a_frozen_client_half_stays_and_the_others_train(data, method, head):
    settings = frozen_config(method, head)
    before = build_network(settings, data.train.sample_shape, data.classes)
    local = run(settings, data)
    client, server = local.clients[0], local.server
    weights = {name: value for name, value in client.half.named_parameters()}
    assert all(torch.equal(value, before.halves.client.state_dict()[name]) for name, value in weights.items())
    assert client.frozen
    assert (client.head is None) == (head == "none" or method == "conventional")
    if client.head is not None:
        assert not any(torch.equal(a, b) for a, b in zip(client.head.parameters(), before.head.parameters(), strict=True))
    assert not torch.equal(server.half.state_dict()["classifier.weight"], before.halves.server.state_dict()["classifier.weight"])
    crossing = client.half(data.train.inputs[:2])
    assert not any(tensor.requires_grad for tensor in crossing)  # no graph is kept


def test_no_head_is_for_frozen_client_halves(data):
    settings = config(model="digits-cnn", cut="block_2")
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, head="none"))
    with pytest.raises(InputError) as caught:
        build_network(settings, data.train.sample_shape, data.classes)
    assert str(caught.value) == (
        "model.head: expected a head that the client half learns from, found none; choose one, or freeze all below the cut"
    )


def test_libraries_by_prefix(monkeypatch):
    made = []

    def create_model(name, *, pretrained, num_classes, in_chans):
        made.append((name, pretrained, num_classes, in_chans))
        return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * 64, num_classes))

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    model = build_model("timm:small", (1, 8, 8), 10, 0, pretrained=True)
    assert made == [("small", True, 10, 1)]
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"model.name 'timm:small': expected timm to be installed, found .*; pip install 'halfpass\[timm\]'"):
        build_model("timm:small", (1, 8, 8), 10, 0)
    with pytest.raises(InputError, match=r"model.pretrained: expected a network of timm, torchvision, hf, found 'digits-cnn'"):
        build_model("digits-cnn", (1, 8, 8), 10, 0, pretrained=True)


def joining(settings, weights):
    return pb.Join(
        protocol=PROTOCOL, client=0, settings=json.dumps(setup.agreed_settings(settings) | {WEIGHTS: weights}),
        inputs=json.dumps({"": ["float32", [1, 8, 8]]}), outputs=10, samples=64, steps=1,
        parameters=build_network(settings, (1, 8, 8), 10).parameters,
        fingerprint=build_network(settings, (1, 8, 8), 10).fingerprint,
    )  # fmt: skip


def test_what_both_sides_have_loaded_is_agreed_on(tmp_path):
    plain = Config(model=ModelConfig("digits-cnn", "block_2"))
    file = _saved(tmp_path, network(1))
    loaded = dataclasses.replace(plain, model=ModelConfig("digits-cnn", "block_2", weights=file))
    digests = build_network(loaded, (1, 8, 8), 10).digests
    assert set(digests) == {"client", "server"}
    assert None not in digests.values()
    Admission(loaded).admit(joining(plain, digests))
    half = tmp_path / "client.safetensors"
    save_file({name: value for name, value in network(1).state_dict().items() if name.startswith(("block_1.", "block_2."))}, half)
    own = build_network(dataclasses.replace(plain, model=ModelConfig("digits-cnn", "block_2", weights=str(half))), (1, 8, 8), 10).digests
    assert own == {"client": digests["client"], "server": None}
    Admission(plain).admit(joining(plain, own))  # each side its own half
    with pytest.raises(InputError, match=r"client 0 at joining: expected initial weights of the server half None \(the server's\), found '.*' loaded at the client; give both"):
        Admission(plain).admit(joining(plain, digests))
    with pytest.raises(InputError, match=r"expected initial weights of the client half '.*', loaded at the server, found None at the client; give both"):
        Admission(loaded).admit(joining(plain, {"client": None, "server": None}))


def test_a_library_s_network_is_no_code_of_a_run_folder():
    settings = Config(model=ModelConfig("timm:resnet18", "layer1", weights="a:b.safetensors"))
    assert named_code(settings) == {}
    assert set(named_code(Config(model=ModelConfig("mine:network", "a")))) == {"model.name"}
    assert set(LIBRARIES) == set(pretrained.LIBRARIES)
