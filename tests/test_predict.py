"""Trained networks are fed as the run fed them: pictures, tables, arrays; in Python and by `halfpass predict`."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import halfpass
from halfpass.commands.cli import main
from halfpass.config import ClientsConfig, Config, DataConfig, ModelConfig, TaskConfig, TrainConfig
from halfpass.data.batches import test_batches as batches_of
from halfpass.data.datasets import load as load_data
from halfpass.data.feeding import feeding_as_dict, feeding_from_dict, feeding_of
from halfpass.data.own import from_datasets
from halfpass.errors import InputError
from halfpass.run.saved import SavedRun

QUICK = TrainConfig(epochs=1, batch_size=16, threads=1)


def trained(folder, **settings):
    settings = {"data": DataConfig("digits", limit=48), "train": QUICK} | settings
    return halfpass.train(Config(out=str(folder), **settings))


class Pairs(torch.utils.data.Dataset):
    classes = ("low", "high")

    def __init__(self, count, seed):
        draws = torch.Generator().manual_seed(seed)
        self.a, self.b = torch.randn(count, 6, generator=draws), torch.randint(0, 5, (count, 3), generator=draws)

    def __len__(self):
        return len(self.a)

    def __getitem__(self, i):
        return {"a": self.a[i], "b": self.b[i], "labels": int(self.a[i].sum() > 0)}


def pairs():
    return Pairs(48, 0), Pairs(20, 1)


class OfPairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.of_a, self.of_b = nn.Linear(6, 8), nn.Embedding(5, 8)
        self.both, self.out = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 2)

    def forward(self, a, b):
        h = self.both(self.of_a(a) + self.of_b(b).mean(1))
        return {"logits": self.out(h), "norm": h.norm(dim=1)}


def of_pairs(shape, outputs):
    return OfPairs()


OF_PAIRS = {"data": DataConfig("test_predict:pairs"), "model": ModelConfig("test_predict:of_pairs", "both"), "task": TaskConfig()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs by name."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    trained(folder / "digits", clients=ClientsConfig(2))
    trained(folder / "whole", method="centralized")
    trained(folder / "pairs", **OF_PAIRS)
    return folder


@pytest.fixture
def said(capsys):
    def run(words, status):
        capsys.readouterr()
        assert main([str(word) for word in words]) == status
        return capsys.readouterr()

    return run


# --- what a data set did to its inputs is done again -----------------------------------------------------------------


def of_test_set(data):
    return torch.cat([inputs for inputs, _ in batches_of(data, data.test, 7)])


def round_trip(feeding):
    return feeding_from_dict("here", json.loads(json.dumps(feeding_as_dict(feeding))))


def test_pictures_are_read_as_the_run_read_them(tmp_path):
    draws = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = draws.integers(0, 4096, (20, 30 + i), dtype=np.uint16) if i == 2 else draws.integers(0, 256, (30, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    data = load_data("imagefolder", str(tmp_path), image_size=16)
    feeding = round_trip(feeding_of(data))
    assert list(feeding.gray_range) == dict(data.scales)["gray range"]
    files = [tmp_path / "test" / name / f"{i}.png" for i in range(3) for name in ("cat", "dog")]
    batches = feeding.batches(feeding.pictures(files), 4)
    assert [len(batch) for batch in batches] == [4, 2]
    assert torch.equal(torch.cat(batches), of_test_set(data))
    assert batches[0].is_contiguous(memory_format=torch.channels_last)
    for file, text in ((tmp_path / "none.png", "expected a picture, found no such file"), (tmp_path, "expected a picture")):
        with pytest.raises(InputError, match=text):
            feeding.pictures([file])
    with pytest.raises(InputError, match="expected picture files"):
        feeding.rows([{"a": 1}])


def test_rows_of_a_table_are_encoded_as_the_run_encoded_them(tmp_path):
    rows = ["age,ward,kind,sick", *(f"{20 + 3 * i},{'ABC'[i % 3]},{i % 2},{'yes' if i % 4 else 'no'}" for i in range(12))]
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "test.csv").write_text("\n".join([rows[0], *rows[3:9]]) + "\n")
    data = load_data("csv", str(tmp_path), target="sick", categorical="kind")
    feeding = round_trip(feeding_of(data))
    values, places, notes = feeding.table(tmp_path / "test.csv")
    assert torch.equal(values, data.test.inputs)
    assert (places[0], notes) == (f"{tmp_path / 'test.csv'}, row 2", [])
    one, _, _ = feeding.rows([{"age": 26, "ward": "C", "kind": 0, "unused": "x"}])
    assert torch.equal(one, data.test.inputs[:1])
    (tmp_path / "new.csv").write_text("kind,ward,age\n1,Z,30\n")  # no target, another order, an unknown category
    values, _, notes = feeding.table(tmp_path / "new.csv")
    assert values[0, 1:].tolist() == [0, 0, 0, 0, 1]
    assert "'Z' is in no training row" in notes[0]
    for text, found in (("ward,kind\nA,1\n", "expected a column 'age'"), ("age,ward,kind\nold,A,1\n", "expected a number, found 'old'"),
                        ("age,ward,kind\n3,,1\n", "expected a value, found ''")):  # fmt: skip
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(InputError, match=found):
            feeding.table(tmp_path / "bad.csv")
    with pytest.raises(InputError, match="row 0: expected a value of column 'ward', found none"):
        feeding.rows([{"age": 1}])


def test_arrays_must_be_as_the_training_samples_were(tmp_path):
    feeding = feeding_of(load_data("digits", limit=8))
    pixels = np.arange(128, dtype=np.uint8).reshape(2, 1, 8, 8)
    assert torch.equal(feeding.arrays(pixels), torch.from_numpy(pixels))
    assert torch.equal(feeding.arrays(pixels[0]), torch.from_numpy(pixels[:1]))  # one sample by itself
    for wrong in (pixels.astype(np.float32), pixels[:, :, :7], pixels[:0], {"x": pixels, "y": pixels}, "text", np.array([{}])):
        with pytest.raises(InputError, match=r"input.*: expected"):
            feeding.arrays(wrong)
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no array")
    for name, text in (("objects.npy", "Object arrays cannot be loaded"), ("text.npy", "expected an array"), ("none.npz", "no such file")):
        with pytest.raises(InputError, match=text):
            feeding.array_file(tmp_path / name)
    named = feeding_of(from_datasets("pairs", *pairs()))
    data = pairs()[1]
    np.savez(tmp_path / "both.npz", a=data.a.numpy(), b=data.b.to(torch.int32).numpy())
    read = named.array_file(tmp_path / "both.npz")
    assert torch.equal(read["a"], data.a)
    assert torch.equal(read["b"], data.b)
    with pytest.raises(InputError, match="expected inputs a, b, found 'a'; give each by its name"):
        named.arrays({"a": data.a})
    with pytest.raises(InputError, match="input a: expected finite values"):
        named.arrays({"a": data.a * math.nan, "b": data.b})


@pytest.mark.parametrize("change", [
    lambda said: said.pop("mean"), lambda said: said.update(inputs={}), lambda said: said.update(std=[0.0]),
    lambda said: said.update(reads="anything"), lambda said: said.update(columns=[["a"]]), lambda said: said.update(inputs={"": ["uint8", [-1]]}),
])  # fmt: skip
def test_what_says_how_to_feed_is_checked(change):
    said = feeding_as_dict(feeding_of(load_data("digits", limit=8)))
    change(said)
    with pytest.raises(InputError, match="here, how to feed it: expected what halfpass wrote"):
        feeding_from_dict("here", said)


# --- trained networks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "whole"])
def test_a_loaded_run_predicts_what_the_run_did(runs, name):
    predictor = halfpass.load(runs / name)
    data = load_data("digits", limit=48)
    predicted = predictor.predict(data.test.inputs)
    result = json.loads((runs / name / "result.json").read_text())
    assert float((predicted.classes == data.test.targets).float().mean()) == pytest.approx(result["test_accuracy"], abs=1e-6)
    row = predicted.rows()[3]
    assert (row["input"], row["class"]) == ("sample 3", str(int(predicted.classes[3])))
    assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert row["probability"] == max(row["probabilities"].values())
    said = json.loads((runs / name / "data.json").read_text())["sites"][0]["inputs"]
    assert said["mean"] == list(predictor.feeding.mean)
    assert "(pixels / 255 - mean) / std" in said["how_to_feed"]


def test_several_inputs_by_name_and_outputs_in_a_dict(runs):
    with pytest.raises(InputError, match=r"model.name: expected no code that is run unasked, found test_predict:of_pairs .*allow_code"):
        halfpass.load(runs / "pairs")
    predictor, data = halfpass.load(runs / "pairs", allow_code=True), pairs()[1]
    predicted = predictor.predict({"a": data.a, "b": data.b})
    assert predicted.answers.shape == (20, 2)
    assert set(predicted.rows()[0]["probabilities"]) == {"low", "high"}
    state = SavedRun([runs / "pairs"]).joined_state()
    model = OfPairs().eval()
    model.load_state_dict(state)
    assert torch.allclose(predicted.answers, model(data.a, data.b)["logits"].softmax(1), atol=1e-6)


def test_owners_files_may_lie_apart_and_say_themselves_what_they_are(runs, tmp_path):
    for place, name in (("site", "client-1"), ("server", "server")):
        (tmp_path / place).mkdir()
        shutil.copy(runs / "digits" / f"{name}.safetensors", tmp_path / place)
    apart, pixels = [tmp_path / "server", tmp_path / "site"], load_data("digits", limit=8).test.inputs
    assert torch.equal(halfpass.load(apart, 1).predict(pixels).answers, halfpass.load(runs / "digits", 1).predict(pixels).answers)
    with pytest.raises(InputError, match=rf"{tmp_path}/site/server.safetensors: expected weights that the run saved, found none; copy it here"):
        halfpass.load(tmp_path / "site", 1)
    with pytest.raises(InputError, match=r"found none in .*server, .*site; copy it here from its owner, or name the folder"):
        halfpass.load(apart, 0)
    trained(tmp_path / "other", clients=ClientsConfig(2))  # the same shapes, another training
    with pytest.raises(InputError, match=r"expected the half of run .*, found that of run .*; take both halves from one training"):
        halfpass.load([tmp_path / "site", tmp_path / "other"], 1)


def test_damaged_weights_are_refused_by_name(runs, tmp_path):
    file = tmp_path / "client-0.safetensors"
    whole = (runs / "digits" / "client-0.safetensors").read_bytes()
    for content in (b"", whole[:100], b"\xff" * 200):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"client-0.safetensors: expected a safetensors file"):
            halfpass.load(tmp_path)
    with safetensors.safe_open(runs / "digits" / "client-0.safetensors", "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(runs / "digits" / "client-0.safetensors")
    for text in ("{", "[]", "{}", metadata["signature"].replace('"format": 1', '"format": 2')):
        save_file(tensors, file, metadata | {"signature": text})
        with pytest.raises(InputError, match=r"client-0.safetensors.*: expected"):
            halfpass.load([tmp_path, runs / "digits"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"expected the folder of a run, found no config.yaml, and no weights"):
        halfpass.load(tmp_path / "empty")
    with pytest.raises(InputError, match=r"expected the folder of a run, found none; check the path"):
        halfpass.load(tmp_path / "nothing")


def test_a_head_that_is_sure_answers_by_itself(runs):
    from halfpass.run.predictor import predictor

    saved, pixels = SavedRun([runs / "digits"]), load_data("digits", limit=48).test.inputs
    joined = halfpass.load(runs / "digits").predict(pixels)
    never, always = (predictor(saved, exit_above=limit).predict(pixels) for limit in (1.0, 0.0))
    assert torch.allclose(never.answers, joined.answers, atol=1e-6)
    assert not never.by_head.any()
    assert always.by_head.all()
    limit = float(always.answers.amax(1).median())
    some = predictor(saved, exit_above=limit).predict(pixels)
    assert some.by_head.tolist() == (always.answers.amax(1) >= limit).tolist()
    expected = torch.where(some.by_head[:, None], always.answers, joined.answers)
    assert torch.allclose(some.answers, expected, atol=1e-6)
    assert {row["answered_by"] for row in some.rows()} == {"head", "server half"}
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="--exit_above: expected a probability, from 0 to 1"):
            predictor(saved, exit_above=value)
    with pytest.raises(InputError, match="--exit_above: expected a run with an auxiliary head"):
        predictor(SavedRun([runs / "whole"]), exit_above=0.5)


# --- the command -----------------------------------------------------------------------------------------------------


def test_predict_prints_text_json_and_csv(runs, tmp_path, said):
    pixels = load_data("digits", limit=8).test.inputs[:3].numpy()
    np.save(tmp_path / "x.npy", pixels)
    words = ["predict", runs / "digits", tmp_path / "x.npy"]
    rows = halfpass.load(runs / "digits").predict(pixels).rows()
    assert said(words, 0).out.splitlines() == [
        f"{tmp_path}/x.npy sample {i}: {row['class']} {row['probability']:.4f}" for i, row in enumerate(rows)
    ]
    read = json.loads(said([*words, "--json"], 0).out)
    assert [row["probabilities"] for row in read["predictions"]] == [row["probabilities"] for row in rows]
    lines = said([*words, "--csv"], 0).out.splitlines()
    assert lines[0].startswith("input,class,probability,probability of 0,")
    assert lines[1].split(",")[1:3] == [rows[0]["class"], repr(rows[0]["probability"])]
    assert "wrote" in said([*words, "--csv", "--out", tmp_path / "new" / "y.csv"], 0).err
    assert (tmp_path / "new" / "y.csv").read_text().splitlines() == lines
    err = said(["predict", runs / "digits", "--test", "--exit_above", "0.2"], 0).err
    result = json.loads((runs / "digits" / "result.json").read_text())
    assert f"on {len(load_data('digits', limit=48).test)} samples" in err
    assert "by itself (probability at least 0.2)" in err
    err = said(["predict", runs / "digits", "--test"], 0).err
    assert f"test accuracy {100 * result['test_accuracy']:.2f} % on 48 samples" in err


@pytest.mark.parametrize(("words", "text"), [
    ([], "INPUT: expected inputs, or --test, found neither"),
    (["x.npy", "--test"], "INPUT: expected inputs, or --test, found both"),
    (["--test", "x.npy"], "INPUT: expected all inputs right behind RUN, found 'x.npy'; write the options behind them"),
    (["x.npy", "--json", "--csv"], "--json: expected one form of output, found --csv too"),
    (["x.png"], r"x.png: expected arrays \(.npy, .npz: uint8 of \(N, 1, 8, 8\)\), found another kind of file"),
    (["x.npy", "--client", "2"], "client: expected a number from 0 to 1, found 2"),
    (["x.npy", "--exit_above", "2"], "--exit_above: expected a probability"),
    (["x.npy", "--server", "example.org:1"], "server address: expected a loopback host"),
    (["x.npy", "--server", "127.0.0.1"], "server address: expected HOST:PORT"),
    (["x.npy", "--out", "."], "--out: expected a file, found a folder"),
])  # fmt: skip
def test_wrong_words_are_refused(runs, words, text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    err = said(["predict", runs / "digits", *words], 2).err
    assert err.startswith("halfpass: ")
    assert err.count("\n") == 1
    assert re.search(text, err), err
