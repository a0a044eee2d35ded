"""The recipes of examples/recipes, each at small size by the command that its page says, and what the pages claim."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from plain import equal
from runtimes import rows_of
from safetensors.torch import load_file

from halfpass.commands.cli import main
from halfpass.config import ClientsConfig, Config, DataConfig
from halfpass.errors import InputError
from halfpass.networks.models import build_model
from halfpass.networks.split import split

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "examples/recipes"


@pytest.fixture(autouse=True)
def _root(monkeypatch):
    monkeypatch.chdir(ROOT)


def trained(name, out, *words):
    """`result.json` of a recipe's run."""
    assert main(["train", "--config", f"examples/recipes/{name}/{name}.yaml", "--out", str(out), *words]) == 0
    return json.loads((out / "result.json").read_text())


def made(name, folder, *arguments):
    """The data of a recipe that has a script for them; what data.path is then."""
    runpy.run_path(str(RECIPES / name / "sites.py"))["write"](folder, *arguments)
    return f"{folder}/site-{{client}}"


@pytest.mark.long
def test_chest_has_an_area_under_the_curve_for_each_finding_and_a_score_for_each_site(tmp_path):
    path = made("chest", tmp_path / "data", 16)
    result = trained(
        "chest", tmp_path / "run", "--data.path", path, "--data.image_size", "48", "--train.epochs", "1",
        "--train.batch_size", "6",
    )  # fmt: skip
    areas = {f"auroc/{finding}" for finding in ("effusion", "nodules", "device", "heart")}
    assert areas <= result["test"].keys()
    assert result["model"] == "resnet50"
    assert 0 <= result["test"]["auroc_macro"] <= 1  # so few steps from random weights need not be better than chance
    assert [site["samples"] for site in result["sites"]] == [6, 3, 2]


def test_resnet50_takes_the_names_and_shapes_of_torchvision():
    state = build_model("resnet50", (3, 224, 224), 1000, seed=0).state_dict()
    assert sum(value.numel() for name, value in state.items() if "running" not in name and "num_batches" not in name) == 25_557_032
    shapes = {"conv1.weight": (64, 3, 7, 7), "layer1.0.downsample.1.running_var": (256,), "layer3.5.conv2.weight": (256, 256, 3, 3), "layer4.2.bn3.bias": (2048,), "fc.weight": (1000, 2048)}
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert len(state) == 320  # of torchvision's file


def test_segmentation_sends_the_skip_beside_what_is_at_the_cut(tmp_path):
    result = trained("segmentation", tmp_path / "run", "--train.epochs", "2", "--train.test_every", "2", "--data.limit", "96", "--clients.count", "1", "--train.batch_size", "8")
    assert result["test"]["mean_iou"] > 0.5  # a third where all is background, at most
    assert {"mean_iou", "dice", "pixel_accuracy"} <= result["test"].keys()
    network = build_model("unet", (1, 64, 64), 3, 0, (3, 64, 64)).eval()
    x = torch.rand(2, 1, 64, 64)
    halves = split(network, "down_2", x)
    crossing = halves.client.eval()(x)
    assert [tuple(value.shape) for value in crossing] == [(2, 32, 32, 32), (2, 16, 64, 64)]
    assert torch.equal(halves.server.eval()(*crossing), network(x))
    assert not torch.equal(halves.server(crossing[0], torch.zeros_like(crossing[1])), network(x))


def test_networks_answer_for_pixels_or_for_pictures():
    with pytest.raises(InputError) as error:
        build_model("unet", (1, 16, 16), 3, 0)
    assert str(error.value) == (
        "model.name 'unet': expected a network with outputs (3,) per sample, found one with (3, 16, 16); choose another task or network, e.g. your own as module:function"
    )
    with pytest.raises(InputError, match=r"expected a network with outputs \(3, 16, 16\) per sample, found one with \(3,\)"):
        build_model("resnet20", (1, 16, 16), 3, 0, (3, 16, 16))


def test_text_sends_the_mask_exactly(tmp_path):
    pytest.importorskip("transformers")
    from examples.recipes.text.notes import data, network

    items = [data()[0][i][0] for i in range(8)]
    inputs = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    whole = network(None, 2).eval()
    halves = split(whole, "bert.encoder.layer.1", inputs)
    crossing = halves.client.eval()(**inputs)
    masks = [value for value in crossing if value.dtype == torch.bool]
    assert len(masks) == 1
    assert torch.equal(masks[0][:, 0, 0], inputs["attention_mask"].bool())
    assert not masks[0].all()  # there is padding
    result = trained("text", tmp_path / "run", "--wire.codec", "int8", "--train.epochs", "2", "--train.test_every", "2", "--data.limit", "128", "--clients.count", "1", "--train.batch_size", "16")
    losses = [row["loss"] for row in rows_of(tmp_path / "run") if row["process"] == "server"]
    assert losses[1] < losses[0]
    assert 0 <= result["test"]["accuracy"] <= 1  # so few steps need not be better than chance


def test_table_trains_alike_between_processes_and_scores_each_site(tmp_path):
    words = ["--data.path", made("table", tmp_path / "data"), "--train.epochs", "5"]
    results = {
        runtime: trained("table", tmp_path / runtime, *words, "--runtime", runtime) for runtime in ("local", "processes")
    }
    for name in ("client-0", "client-1", "server"):
        local, processes = (load_file(tmp_path / runtime / f"{name}.safetensors") for runtime in results)
        assert equal(local, processes)
    local, processes = results.values()
    assert local["sites"] == processes["sites"]
    assert [site["samples"] for site in local["sites"]] == [107, 63]
    assert all(site["test"]["auroc_macro"] > 0.9 for site in local["sites"])
    assert local["sites"][0]["test"] != local["sites"][1]["test"]
    for client, site in enumerate(local["sites"]):  # a joined network is tested on its client's own test set
        assert main(["export", str(tmp_path / "local"), "--client", str(client), "--allow_code", "--out", str(tmp_path / f"{client}.safetensors")]) == 0
        assert site["test"]["auroc_macro"] > 0.9


def test_data_of_each_client_need_own_data_and_must_agree(tmp_path, capsys):
    with pytest.raises(InputError) as error:
        Config(data=DataConfig(path="DIR/site-{client}"), clients=ClientsConfig(2))
    assert str(error.value) == (
        "data.path: expected no {client} where all data are one: it needs clients.partition own and a split method, found DIR/site-{client}; change one of them"
    )
    path = made("table", tmp_path / "data")
    words = ["train", "--config", "examples/recipes/table/table.yaml", "--data.path", path, "--out", str(tmp_path / "run")]
    assert main([*words, "--data.normalization", "agreed"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("halfpass: client 1: expected data, mean and deviation of columns: [['mean radius',")
    assert said.endswith("; normalize alike, or set data.normalization to own where each client's own is meant\n")
    assert not (tmp_path / "run").exists()
