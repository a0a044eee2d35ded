"""Data that people bring: functions, folders, tables; drawn when due; agreed on between sites."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from runtimes import train_in_both_runtimes
from safetensors.torch import load_file
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import TensorDataset, random_split

from halfpass.commands.export import export
from halfpass.config import ClientsConfig, Config, DataConfig, ModelConfig, TaskConfig, TrainConfig, WireConfig
from halfpass.data import cifar, pictures
from halfpass.data.batches import batch_count, test_batches, train_batches
from halfpass.data.datasets import DATASETS, Dataset, Samples, Source, Stream, from_datasets, load
from halfpass.data.samples import digest, draw, overlap
from halfpass.errors import HalfpassError, InputError
from halfpass.run import setup
from halfpass.run.admission import Admission
from halfpass.run.network import build_network
from halfpass.run.records import RunFolder
from halfpass.run.train import resume, train
from halfpass.seed import derive_seed
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.messages import PROTOCOL


def message(call):
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Items(TorchDataset):
    def __init__(self, items, **attributes):
        self.items, self.calls = items, 0
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.calls += 1
        return self.items[i]


class Noisy(Items):
    """Adds noise of one of the three global generators."""

    def __init__(self, count, draw=lambda: torch.randn(2)):
        super().__init__([(torch.full((2,), float(i)), i % 3) for i in range(count)])
        self.draw = draw

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.as_tensor(self.draw()).float(), y


def epoch_of(data, samples=None, *, epoch=0, client=0, seed=0, size=4):
    return list(train_batches(data, samples or data.train, size, seed=seed, client=client, epoch=epoch))


# --- trees ------------------------------------------------------------------------------------------------------------


def test_several_inputs_and_targets_keep_their_nesting_and_their_types():
    def item(i):
        picture = np.full((3, 4, 5), 10 * i, np.uint8)
        return {"picture": picture, "row": (np.float64(i), i), "mask": np.array([True, i > 2])}, {"class": i, "value": i / 2}

    data = from_datasets("own", Items([item(i) for i in range(6)]), Items([item(1)]))
    assert data.train.sample_shape == {"picture": (3, 4, 5), "row": ((), ()), "mask": (2,)}
    assert data.train.kinds() == (
        "{picture: uint8 (3, 4, 5), row/#0: float32 (), row/#1: int64 (), mask: bool (2,)}",
        "{class: int64 (), value: float32 ()}",
    )
    (x, y), *_ = epoch_of(data, size=6)
    order = y["class"]
    assert torch.equal(x["row"][1], order)
    assert x["row"][1].dtype == torch.int64  # integers reach the network as such
    assert torch.equal(x["mask"], torch.stack([torch.ones(6).bool(), order > 2], 1))
    assert torch.equal(y["value"], order / 2)
    plain = (10 * order / 255 - data.mean[0]) / data.std[0]
    torch.testing.assert_close(x["picture"][:, 0, 0, 0], plain.float())
    assert "expected int64 (), a class per sample, found {class" in message(lambda: data.train.labels)


def test_a_dict_s_labels_are_the_target_as_in_hugging_face_sets():
    items = [{"input_ids": [1, 2, i], "attention_mask": [1, 1, 0], "labels": i % 2} for i in range(4)]
    data = from_datasets("own", Items(items), Items(items[:1]))
    assert data.train.inputs["input_ids"].tolist() == [[1, 2, 0], [1, 2, 1], [1, 2, 2], [1, 2, 3]]
    assert data.train.inputs["input_ids"].dtype == torch.int64
    assert data.train.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(("value", "kind"), [
    (np.arange(3.0)[::-1], "float32 (3,)"),
    (np.arange(3, dtype=">i2"), "int64 (3,)"),
    (np.arange(3, dtype=np.uint16), "int64 (3,)"),
    (torch.zeros(3, dtype=torch.float64), "float32 (3,)"),
    (torch.zeros(3, dtype=torch.bfloat16), "float32 (3,)"),
    (2.5, "float32 ()"),
    ((torch.zeros(2), np.int8(1)), "{#0: float32 (2,), #1: int64 ()}"),
])  # fmt: skip
def test_numbers_of_any_kind_are_taken(value, kind):
    data = from_datasets("own", Items([(value, 0), (value, 1)]), Items([(value, 0)]))
    assert data.train.kinds()[0] == kind
    if isinstance(value, np.ndarray):
        assert data.train.inputs[0].tolist() == value.tolist()


@pytest.mark.parametrize(("targets", "kind", "outputs"), [
    ([0.5, -1.5], "float32 ()", 1),
    ([np.array([1.0, np.nan, 0.0])] * 2, "float32 (3,)", 3),
    ([np.zeros((4, 4), np.uint8), np.full((4, 4), 6, np.uint8)], "int64 (4, 4)", 7),
    ([np.array([3]), np.array([1])], "int64 ()", 4),  # a class number in a list of its own
])  # fmt: skip
def test_targets_of_other_tasks_are_taken_as_they_are(targets, kind, outputs):
    data = from_datasets("own", Items([(torch.zeros(2), t) for t in targets]), Items([(torch.ones(2), targets[0])]))
    assert (data.train.kinds()[1], data.classes) == (kind, outputs)


@pytest.mark.parametrize(("item", "said"), [
    (({"a/b": 1.0}, 0), "sample 0, input: expected names without / or #, found 'a/b'; name it otherwise in the data set"),
    ((1.0, 2.0, 0), "sample 0: expected (input, target), or a dict with a key 'labels', found a tuple of 3; convert it"),
    (({"a": "text"}, 0), "sample 0, input 'a': expected a tensor, array or number, found str; convert it in the data set"),
    (((), 0), "sample 0, input: expected a tensor, array or number, found tuple; convert it in the data set"),
    (({"a": 1.0, "b": float("nan")}, 0), "input 0, 'b': expected finite values, found NaN or infinity; mend or remove it"),
])  # fmt: skip
def test_what_is_no_tree_of_numbers_is_named(item, said):
    assert f"data own, train, {said}" in message(lambda: from_datasets("own", Items([item]), Items([(1.0, 0)])))


# --- module:function --------------------------------------------------------------------------------------------------

FUNCTIONS = """
import random, numpy as np, torch
from torch.utils.data import TensorDataset, random_split
whole = TensorDataset(torch.arange(40.0)[:, None], torch.arange(40) % 2)
def split(): return random_split(whole, [30, 10])
def drawn():
    x = torch.tensor([[random.random(), np.random.rand(), float(torch.rand(()))] for _ in range(4)])
    return TensorDataset(x, torch.zeros(4).long()), TensorDataset(x + 1, torch.zeros(4).long())
def at(path): return TensorDataset(torch.full((3, 1), float(len(path))), torch.zeros(3).long()), split()[1]
def anywhere(**named): return at(named["path"])
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "brought.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield
    sys.modules.pop("brought", None)


@pytest.mark.usefixtures("functions")
def test_a_random_split_is_the_same_in_every_process_and_disturbs_nothing():
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(2), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    first = [load(f"brought:{name}") for name in ("split", "drawn")]
    assert torch.equal(torch.rand(2), expected[0])
    assert np.random.rand() == expected[1]
    np.random.seed(7)
    sys.modules.pop("brought")
    again = [load(f"brought:{name}") for name in ("split", "drawn")]
    for one, other in zip(first, again, strict=True):
        assert one.agreement(shared=True) == other.agreement(shared=True)
        assert torch.equal(one.train.inputs, other.train.inputs)
    assert not set(first[0].train.inputs.flatten().tolist()) & set(first[0].test.inputs.flatten().tolist())


@pytest.mark.usefixtures("functions")
def test_a_path_is_handed_on_or_refused():
    assert load("brought:at", "/ab").train.inputs[0, 0] == 3
    assert load("brought:anywhere", "/abc").train.inputs[0, 0] == 4
    assert message(lambda: load("brought:split", "siteA")) == (
        "data.path: expected none, because brought:split takes no path, found 'siteA'; "
        "give the function an argument path, or leave data.path out"
    )
    assert message(lambda: load("brought:at")) == (
        "data.path: expected the path that brought:at takes, found none; set data.path"
    )


# --- settings that do nothing -----------------------------------------------------------------------------------------


def test_the_settings_of_a_source_are_those_of_the_configuration():
    config = DataConfig()
    assert {name: getattr(config, name) for name in Source.__dataclass_fields__ if name != "name"} == {
        name: field.default for name, field in Source.__dataclass_fields__.items() if name != "name"
    }
    assert Source.__dataclass_fields__.keys() == DataConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize(("name", "setting", "value"), [
    ("digits", "path", "siteA"), ("digits", "image_size", 64), ("listops", "path", "x"), ("digits", "crop_padding", 3),
    ("cifar10", "image_size", 64), ("csv", "image_size", 64), ("imagefolder", "target", "a"), ("mine:data", "download", True),
    ("mine:data", "image_size", 64), ("cifar10", "classes", "10"), ("csv", "workers", 2),
])  # fmt: skip
def test_settings_that_mean_nothing_to_a_data_set_are_refused(name, setting, value):
    said = message(lambda: load(name, **{setting: value}))
    expected = f"data.{setting}: expected its default with data.name {name}, which takes no notice of it, found {value!r}; "
    assert said.startswith(expected + "leave it out, or set data.name (")
    assert all(other in DATASETS or other == "module:function" for other in said.rpartition("(")[2][:-1].split(", "))


def test_alpha_without_dirichlet_is_refused():
    from halfpass.config import ClientsConfig

    assert message(lambda: ClientsConfig(alpha=0.1)) == (
        "clients.alpha: expected its default in partition iid, found 0.1; leave it out, or set clients.partition to dirichlet"
    )
    assert ClientsConfig(alpha=0.1, partition="dirichlet").alpha == 0.1


# --- drawn when due ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", [
    lambda: torch.randn(2), lambda: np.random.randn(2), lambda: [random.random(), random.random()]
])  # fmt: skip
def test_what_augments_is_drawn_anew_in_each_epoch_by_seed_client_epoch_and_sample(generator):
    noisy = Noisy(20, generator)
    data = from_datasets("own", noisy, Noisy(8, generator))
    assert isinstance(data.train, Stream)
    assert isinstance(data.test, Samples)
    assert not isinstance(data.test, Stream)  # what is tested on stays as it is
    noisy.calls = 0
    epochs = [epoch_of(data, epoch=epoch) for epoch in range(3)]
    assert noisy.calls == 60
    by_label = [torch.cat([x for x, _ in epoch]).sort(0).values for epoch in epochs]
    assert not torch.equal(by_label[0], by_label[1])
    torch.manual_seed(3)
    for again, before in zip(epoch_of(data, epoch=1), epochs[1], strict=True):
        assert torch.equal(again[0], before[0])
        assert torch.equal(again[1], before[1])
    # a sample is the same whichever others are drawn before it: by hand
    order = torch.randperm(20, generator=torch.Generator().manual_seed(derive_seed(0, "order", 0, 2)))
    by_hand = [draw(data.train.items, int(i), 0, 0, 2)[0] for i in order[:4]]
    assert torch.equal(epochs[2][0][0], torch.stack(by_hand))
    for other in ({"seed": 1}, {"client": 1}):
        assert not torch.equal(epoch_of(data, **other)[0][0], epochs[0][0][0])


def test_drawing_disturbs_no_generator_and_workers_change_nothing():
    data = from_datasets("own", Noisy(12), Noisy(5))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    plain = epoch_of(data)
    assert torch.equal(torch.rand(3), expected)
    worked = epoch_of(from_datasets("own", Noisy(12), Noisy(5), workers=2))
    assert len(plain) == len(worked) == 3
    for one, other in zip(plain, worked, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_one_that_draws_for_few_items_only_is_found_out():
    class Seldom(Noisy):
        def __getitem__(self, i):
            return super().__getitem__(i) if i == 9 else self.items[i]

    assert isinstance(from_datasets("own", Seldom(12), Noisy(3)).train, Stream)


def test_a_set_says_itself_or_the_setting_does():
    plain = Items([(torch.zeros(2), 0), (torch.ones(2), 1)])
    assert type(from_datasets("own", plain, plain).train) is Samples
    assert type(from_datasets("own", Items(plain.items, draws=True), plain).train) is Stream
    assert type(from_datasets("own", plain, plain, loading="stream").test) is Stream
    assert type(from_datasets("own", Noisy(3), plain, loading="memory").train) is Samples
    noisy = Noisy(3)
    noisy.draws = False
    assert type(from_datasets("own", noisy, plain).train) is Samples


def test_a_generator_of_its_own_is_said():
    own = np.random.default_rng(0)
    data = from_datasets("own", Noisy(6, lambda: own.normal(size=2)), Noisy(3))
    assert isinstance(data.train, Stream)
    assert data.notes == (
        "data own, train: items differ under the same seed, so a resumed run draws others; "
        "draw from torch's, numpy's or Python's global generator",
    )


def test_what_does_not_fit_is_streamed_and_gives_the_batches_that_memory_would(monkeypatch):
    pixels = torch.randint(0, 256, (30, 3, 6, 5), dtype=torch.uint8)
    items = Items([(pixels[i], i % 4) for i in range(30)])
    memory = from_datasets("own", items, items)
    monkeypatch.setattr("halfpass.data.own.available_bytes", lambda: 4 * 30 * (90 + 8) - 1)
    stream = from_datasets("own", items, items, classes="4")
    assert isinstance(stream.train, Stream)
    assert (stream.mean, stream.std, stream.classes) == (memory.mean, memory.std, 4)
    for make in (epoch_of, lambda data: list(test_batches(data, data.test, 7))):
        for one, other in zip(make(memory), make(stream), strict=True):
            assert torch.equal(one[0], other[0])
            assert one[0].stride() == other[0].stride()
            assert torch.equal(one[1], other[1])
    assert message(lambda: from_datasets("own", items, items)) == (
        "data.classes: expected the classes of a data set that is too large to be read for them, found none; "
        "count or name them, or let data own have `classes`"
    )
    known = Items(items.items, targets=[i % 4 for i in range(30)])
    assert from_datasets("own", known, items).classes == 4
    assert from_datasets("own", random_split(known, [20, 10])[0], items).train.labels.max() == 3
    assert "too large" in message(lambda: from_datasets("own", Items(items.items, targets=[0] * 30), items))  # they lie


def test_a_broken_sample_of_a_stream_is_named_also_by_a_worker():
    class Broken(Noisy):
        def __getitem__(self, i):
            if i == 5:
                raise OSError("disk gone")
            return super().__getitem__(i)

    for workers in (0, 1):
        data = from_datasets("own", Broken(8), Noisy(3), loading="stream", workers=workers, classes="3")
        assert message(partial(epoch_of, data)) == (
            "data own, train, sample 5: expected (input, target), found OSError: disk gone; mend the data set"
        )
    data = from_datasets("own", Noisy(8), Noisy(2), classes="2")
    assert "expected a class in 0..1, found 2" in message(partial(epoch_of, data))


def test_a_stream_is_taken_limited_and_held_out_like_any_samples():
    data = from_datasets("own", Noisy(10), Noisy(3))
    part = data.train.take(torch.tensor([7, 1]))
    assert (len(part), part.labels.tolist(), part.sample_shape) == (2, [1, 1], (2,))
    assert torch.equal(part.inputs, part.to(torch.device("cpu")).inputs)
    assert batch_count(len(part), 8) == 1


# --- overlap, names, agreement ----------------------------------------------------------------------------------------


def test_test_samples_that_are_training_samples_are_said():
    x = torch.arange(12.0).view(6, 2)
    whole = TensorDataset(x, torch.arange(6) % 2)
    assert from_datasets("own", whole, TensorDataset(x + 1, torch.arange(6) % 2)).notes == ()
    leaking = TensorDataset(torch.cat([x[:2], x + 1]), torch.arange(8) % 2)
    assert from_datasets("own", whole, leaking).notes == (
        "data own: 2 of 8 test samples are training samples too, and tell little",
    )
    train = Samples({"a": x, "b": x[:, 0].long()}, torch.zeros(6).long())
    assert overlap(train, train.take(torch.tensor([0, 5]))) == 2
    assert overlap(train, Samples({"a": x, "b": x[:, 0].long() + 1}, torch.zeros(6).long())) == 0


def test_names_settle_the_number_of_classes():
    some = Items([(torch.zeros(2), 0), (torch.ones(2), 1)])
    assert from_datasets("own", some, some, classes="5").classes == 5
    named = from_datasets("own", some, some, classes="bird, cat,dog")
    assert (named.classes, named.names) == (3, ("bird", "cat", "dog"))
    own = Items(some.items, classes=["cat", "dog"])
    assert from_datasets("own", random_split(own, [1, 1])[0], some).names == ("cat", "dog")
    assert message(lambda: from_datasets("own", own, some, classes="dog,cat")) == (
        "data own, classes: expected those of data.classes, dog, cat, found cat, dog; "
        "number the labels by data.classes, and let the data set's `classes` say so"
    )
    assert "different names separated by commas, found 'a,a'" in message(lambda: from_datasets("own", some, some, classes="a,a"))


def test_the_digest_is_of_values_and_order_not_of_memory():
    pixels = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    samples = Samples(pixels, torch.arange(5))
    same = Samples(pixels.contiguous(memory_format=torch.channels_last), torch.arange(5))
    assert digest(samples) == digest(same)
    for other in (samples.take(torch.tensor([0, 1, 2, 4, 3])), Samples(pixels, torch.arange(5) + 1)):
        assert digest(other) != digest(samples)
    stream = from_datasets("own", Noisy(100), Noisy(3)).train
    assert digest(stream) == digest(from_datasets("own", Noisy(100), Noisy(3)).train)
    assert digest(stream) != digest(from_datasets("own", Noisy(100, lambda: torch.rand(2)), Noisy(3)).train)


def joining(config, data, client=0):
    network = build_network(config, data.train.sample_shape, data.classes)
    settings = setup.agreed_settings(config) | {"data": setup.agreement(config, data)}
    return pb.Join(
        protocol=PROTOCOL, client=client, settings=json.dumps(settings), inputs=json.dumps({"": ["float32", list(data.train.sample_shape)]}),
        outputs=data.classes, samples=len(data.train), steps=batch_count(len(data.train), config.train.batch_size),
        parameters=network.parameters, fingerprint=network.fingerprint,
    )  # fmt: skip


def config_of(partition, **data):
    from halfpass.config import ClientsConfig, ModelConfig

    data_config = DataConfig("imagefolder", **data)
    return Config(data=data_config, model=ModelConfig("digits-cnn"), clients=ClientsConfig(2, partition=partition))


def pictures_of(names, mean=(0.0,), labels=None):
    labels = torch.arange(4) % len(names) if labels is None else labels
    samples = Samples(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), labels)
    return Dataset("imagefolder", samples, samples, len(names), mean, (1.0,), names=tuple(names))


def test_sites_whose_classes_differ_are_refused_and_both_lists_shown():
    config = config_of("own")
    admission = Admission(config)
    admission.admit(joining(config, pictures_of(["cat", "dog"])))
    assert message(lambda: admission.admit(joining(config, pictures_of(["bird", "cat"]), 1))) == (
        "client 1 at joining: expected data, class names: ['cat', 'dog'] (the first client's), found ['bird', 'cat']; "
        "give all clients the same class names in the same order: data.classes"
    )
    assert "class names: ['cat', 'dog'] (the first client's), found ['cat'];" in message(
        lambda: admission.admit(joining(config, pictures_of(["cat"]), 1))
    )
    admission.admit(joining(config, pictures_of(["cat", "dog"], labels=torch.zeros(4).long()), 1))  # has no dog
    unnamed = Admission(config)
    unnamed.admit(joining(config, dataclasses.replace(pictures_of(["cat", "dog"]), names=())))
    assert message(
        lambda: unnamed.admit(joining(config, dataclasses.replace(pictures_of(["a", "b", "c"]), names=()), 1))
    ) == (
        "client 1 at joining: expected number of classes 2 (the server's), found 3; "
        "name the classes, or their number, in data.classes, alike for all clients and the server"
    )


def test_sites_normalize_alike_or_say_that_they_mean_it():
    admission = Admission(config_of("own"))
    admission.admit(joining(config_of("own"), pictures_of(["a", "b"])))
    other = pictures_of(["a", "b"], mean=(0.5,))
    assert message(lambda: admission.admit(joining(config_of("own"), other, 1))) == (
        "client 1 at joining: expected data, mean: [0.0] (the first client's), found [0.5]; "
        "normalize alike, or set data.normalization to own where each client's own is meant"
    )
    meant = config_of("own", normalization="own")
    admission = Admission(meant)
    admission.admit(joining(meant, pictures_of(["a", "b"])))
    admission.admit(joining(meant, other, 1))


def test_data_that_are_dealt_out_must_be_the_same():
    config = config_of("iid")
    admission = Admission(config)
    admission.admit(joining(config, pictures_of(["a", "b"])))
    other = pictures_of(["a", "b"], labels=torch.tensor([1, 0, 1, 0]))
    said = message(lambda: admission.admit(joining(config, other, 1)))
    assert said.startswith("client 1 at joining: expected data, training samples (digest): '")
    own = config_of("own")
    admission = Admission(own)
    admission.admit(joining(own, pictures_of(["a", "b"])))
    admission.admit(joining(own, other, 1))


def test_what_a_client_says_of_its_data_is_bounded_and_checked():
    config = config_of("own")
    data = pictures_of(["a", "b"])
    good = joining(config, data)
    settings = json.loads(good.settings)
    for content, said in (("text", "expected what its data hold, by name, found str"), (["x"], "found list")):
        bad = pb.Join()
        bad.CopyFrom(good)
        bad.settings = json.dumps(settings | {"data": content})
        assert said in message(partial(Admission(config).admit, bad))
    admission = Admission(config)
    admission.admit(good)
    long = joining(config, pictures_of(["x" * 5000, "\x1b[31m"]), 1)
    said = message(lambda: admission.admit(long))
    assert len(said) < 1500
    assert "\x1b" not in said


# --- folders ----------------------------------------------------------------------------------------------------------


def save(file, array, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file, **options)


@pytest.fixture
def folder(tmp_path):
    gray = np.full((8, 8, 3), 100, np.uint8)
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            for i in range(2):
                save(tmp_path / split / name / f"{i}.png", gray + 10 * number + i + 50 * (split == "test"))
    return tmp_path


def test_folders_are_read_whole_and_what_is_left_out_is_named(folder):
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    for name, split in (("a.tif", "train"), ("deep/er/b.TIFF", "train"), ("c.gif", "test"), ("d.webp", "test"), ("e.bmp", "train")):
        save(folder / split / "cat" / name, red if split == "train" else red // 2)
    read = load("imagefolder", str(folder), image_size=4)
    assert (len(read.train), len(read.test), read.names, read.notes) == (7, 6, ("cat", "dog"), ())
    assert (read.train.inputs[:, 0] == 255).all(1).all(1).sum() == 3
    (folder / "train" / "dog" / "scan.dcm").write_text("x")
    (folder / "train" / "dog" / ".DS_Store").write_text("x")
    (note,) = load("imagefolder", str(folder), image_size=4).notes
    suffixes = ".png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff, .gif"
    assert note == f"data {folder}: the file {folder}/train/dog/scan.dcm is left out; pictures end in {suffixes}"
    (folder / "test" / "list.txt").write_text("x")
    assert f"2 files are left out, the first {folder}/train/dog/scan.dcm;" in load("imagefolder", str(folder), image_size=4).notes[0]


def test_a_picture_is_turned_composited_or_refused(folder):
    file, array = folder / "train" / "cat" / "z.png", np.zeros((8, 8, 3), np.uint8)
    array[:4] = 255  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by half
    save(file, array, exif=exif.tobytes())
    read = partial(load, "imagefolder", str(folder), image_size=8, limit=5)
    turned = next(x for x in read().train.inputs if x.max() == 255)
    assert turned[0, :, 0].tolist() == 4 * [0] + 4 * [255]
    alpha = np.full((8, 8, 4), 200, np.uint8)
    alpha[..., 3] = 0
    alpha[0, 0, 3] = 255
    save(file, alpha)
    shown = next(x for x in read().train.inputs if x.max() == 200)
    assert shown[0].flatten().tolist() == [200] + 63 * [0]
    Image.fromarray(array).save(file, format="GIF", save_all=True, append_images=[Image.fromarray(255 - array)])
    assert f"{file}: expected a picture, found an unreadable file (ValueError: 2 frames, where one can be read)" in message(read)
    Image.fromarray(array).save(file, format="PPM")
    assert f"{file}: expected a picture, found an unreadable file (UnidentifiedImageError: cannot identify" in message(read)


def test_a_picture_of_too_many_pixels_is_refused_by_its_header(folder, monkeypatch):
    file = folder / "train" / "cat" / "z.png"
    Image.new("L", (16, 9)).save(file)
    read = partial(load, "imagefolder", str(folder), image_size=8)
    monkeypatch.setattr(pictures, "MOST_PIXELS", 16 * 9)
    read()
    monkeypatch.setattr(pictures, "MOST_PIXELS", 16 * 9 - 1)
    decoding = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded") if self.size == (16, 9) else decoding(self))
    assert message(read) == f"{file}: expected a picture of at most 143 pixels, found 16 × 9; scale it down or remove it"
    monkeypatch.undo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 71)  # Pillow's own, of which twice as many are refused
    assert f"{file}: expected a picture of at most 33,554,432 pixels, found several times as many" in message(read)


def test_a_site_that_lacks_a_class_takes_part_by_data_classes(folder):
    for split in ("train", "test"):
        for file in (folder / split / "dog").iterdir():
            file.unlink()
        (folder / split / "dog").rmdir()
    assert load("imagefolder", str(folder), image_size=4).classes == 1
    read = load("imagefolder", str(folder), image_size=4, classes="bird,cat,dog")
    assert (read.classes, read.names, read.train.labels.tolist()) == (3, ("bird", "cat", "dog"), [1, 1])
    assert message(lambda: load("imagefolder", str(folder), classes="dog,bird")) == (
        f"{folder}/train/cat: expected a class of data.classes, dog, bird, found cat; name it there too, or remove the folder"
    )


def test_many_pictures_are_streamed_with_the_same_values(folder):
    memory, stream = (load("imagefolder", str(folder), image_size=4, loading=how) for how in ("memory", "stream"))
    assert isinstance(stream.train, Stream)
    for one, other in zip(epoch_of(memory), epoch_of(stream), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


# --- tables -----------------------------------------------------------------------------------------------------------

TRAIN = "id,age,ward,height,label\n1,20,a,1.5,yes\n2,30,b,2.5,no\n3,40,a,3.5,yes\n"
TEST = "id,age,ward,height,label\n4,50,b,2.5,no\n5,30,c,1.5,no\n"


@pytest.fixture
def table(tmp_path):
    (tmp_path / "train.csv").write_text(TRAIN)
    (tmp_path / "test.csv").write_text(TEST)
    return tmp_path


def test_a_table_is_standardized_by_its_training_rows_and_categories_become_columns(table):
    data = load("csv", str(table), target="label", ignore="id")
    ages = np.array([20, 30, 40.0])
    expected = np.array([(np.array([50.0, 30]) - ages.mean()) / ages.std(), [0, 0], [1, 0]]).T
    torch.testing.assert_close(data.test.inputs[:, :3], torch.from_numpy(expected).float())
    assert data.train.inputs[:, 1:3].tolist() == [[1, 0], [0, 1], [1, 0]]
    assert data.train.inputs.mean(0)[[0, 3]].abs().max() < 1e-6
    assert (data.names, data.train.labels.tolist(), data.test.labels.tolist()) == (("no", "yes"), [1, 0, 1], [0, 0])
    assert data.notes == (
        f"data csv: {table}/test.csv, row 3, column 'ward': 'c' is in no training row and counts as none of its categories (1 rows)",
    )
    agreed = data.agreement(shared=False)
    assert agreed["columns"] == [["age", "number"], ["ward", ["a", "b"]], ["height", "number"]]
    assert agreed["mean and deviation of columns"][0] == ["age", 30.0, pytest.approx(ages.std())]
    assert "mean and deviation of columns" not in data.agreement(shared=False, normalization=False)
    named = load("csv", str(table), target="label", ignore="id,height", categorical="ward=c|b|a,age", classes="no,maybe,yes")
    assert named.train.sample_shape == (6,)
    assert (named.classes, named.train.labels.tolist()) == (3, [2, 0, 2])


@pytest.mark.parametrize(("settings", "kind", "classes", "names"), [
    ({"target": "age"}, "float32 ()", 1, ()),
    ({"target": "age", "target_kind": "classes"}, "int64 ()", 4, ("20", "30", "40", "50")),
    ({"target": "height,age"}, "float32 (2,)", 2, ("height", "age")),
    ({"target": "grade"}, "int64 ()", 3, ()),  # 0, 1 and 2
    ({"target": "grade", "target_kind": "numbers"}, "float32 ()", 1, ()),
    ({"target": "grade", "classes": "5"}, "int64 ()", 5, ()),
    ({"target": "id", "classes": "9"}, "int64 ()", 9, ()),
])  # fmt: skip
def test_target_columns_of_numbers(table, settings, kind, classes, names):
    for name, text, grades in (("train", TRAIN, [0, 1, 2]), ("test", TEST, [2, 0])):
        header, *rows = text.splitlines()
        added = [f"{header},grade", *(f"{row},{grade}" for row, grade in zip(rows, grades, strict=True))]
        (table / f"{name}.csv").write_text("\n".join(added))
    data = load("csv", str(table), ignore="ward,label", **settings)
    assert (data.train.kinds()[1], data.classes, data.names) == (kind, classes, names)


def test_missing_targets_of_several_columns_are_nan(table):
    (table / "train.csv").write_text(TRAIN.replace("2,30,", "2,,"))
    data = load("csv", str(table), target="age,height", ignore="ward,label")
    assert data.train.targets[:, 0].isnan().tolist() == [False, True, False]
    assert data.train.targets[1, 1] == 2.5


@pytest.mark.parametrize(("change", "settings", "said"), [
    (("2,30,", "2,,"), {}, "{table}/train.csv, row 3, column 'age': expected a number, found ''; fill it in, or leave the row out"),
    (("2,30,", "2,3o,"), {}, "{table}/train.csv, row 3, column 'age': expected a number, like others of this column, found '3o'; correct it, or name the column in data.categorical"),
    (("2,30,b", "2,30,NA"), {}, "{table}/train.csv, row 3, column 'ward': expected a value, found 'NA'; fill it in, or leave the row out"),
    (("2.5,no", "2.5,"), {}, "{table}/train.csv, row 3, column 'label': expected a target, found ''; fill it in, or leave the row out"),
    (("2.5,no", "2.5"), {}, "{table}/train.csv, row 3: expected 5 values, as in the header, found 4; check data.separator"),
    (("height", "age"), {}, "{table}/train.csv, row 1: expected a name for each column, each once, found 'age'; name the columns"),
    (("height", "hight"), {}, "{table}: expected the same columns in both files, found 'height' only in test.csv; mend one"),
    (("", ""), {"target": "lable"}, "data.target: expected one of id, age, ward, height, label, found 'lable'; did you mean 'label'?"),
    (("", ""), {"target": None}, "data.target: expected the target column, or several, found none; choose of id, age"),
    (("", ""), {"classes": "yes,never"}, "{table}/train.csv, row 3, column 'label': expected a class of data.classes, yes, never, found 'no'; name it there too"),
    (("", ""), {"test_share": 0.5}, "data.test_share: expected its default where {table} has train.csv and test.csv, found 0.5; leave it out"),
    (("", ""), {"categorical": "ward=a"}, "{table}/train.csv, row 3, column 'ward': expected a category of a, found 'b'; name it in data.categorical too"),
])  # fmt: skip
def test_what_is_wrong_with_a_table_is_named_by_file_row_and_column(table, change, settings, said):
    (table / "train.csv").write_text(TRAIN.replace(*change) if change[0] else TRAIN)
    read = partial(load, "csv", str(table), **({"target": "label"} | settings))
    assert message(read).startswith(said.format(table=table))


def test_one_file_is_split_always_the_same_way(table):
    file = table / "all.tsv"
    file.write_text("x\ty\n" + "".join(f"{i}\t{i % 2}\n" for i in range(20)))
    read = partial(load, "csv", str(file), target="y", separator="\t", test_share=0.25)
    one, again = read(), read()
    assert (len(one.train), len(one.test)) == (15, 5)
    assert torch.equal(one.test.inputs, again.test.inputs)
    assert one.notes == ()
    assert message(lambda: load("csv", str(file), target="y", separator="\t")) == (
        f"data.test_share: expected a share of {file} to be tested on, found none; 0.2 is usual"
    )


def test_a_table_of_pictures(folder):
    for split in ("train", "test"):
        rows = "".join(f"{split}/{name}/{i}.png,{i},{'' if name == 'dog' else 1},x\n" for name in ("cat", "dog") for i in range(2))
        (folder / f"{split}.csv").write_text(f"file,one,two,site\n{rows}")
    data = load("imagetable", str(folder), target="one,two", image_size=4)
    assert (data.names, data.classes, data.train.kinds()) == (("one", "two"), 2, ("uint8 (3, 4, 4)", "float32 (2,)"))
    assert data.train.inputs[:, 0, 0, 0].tolist() == [100, 101, 110, 111]
    assert data.train.targets[:, 1].isnan().tolist() == [False, False, True, True]
    assert data.notes == (f"data {folder}: columns that are not used: site",)
    stream = load("imagetable", str(folder), target="one,two", image_size=4, loading="stream")
    (x, y), (x2, y2) = epoch_of(stream)[0], epoch_of(data)[0]
    assert torch.equal(x, x2)
    torch.testing.assert_close(y, y2, equal_nan=True)
    (folder / "train" / "cat" / "1.png").unlink()
    assert message(lambda: load("imagetable", str(folder), target="one")) == (
        f"{folder}/train.csv, row 3, column 'file': expected a file in {folder}, found 'train/cat/1.png'; check the path"
    )
    assert "expected a picture (.png" in message(lambda: load("imagetable", str(folder), target="one", picture="site"))


# --- hostile pickles: bounded before anything is built ----------------------------------------------------------------


@pytest.mark.parametrize(("opcodes", "found"), [
    (b"]" * 40 + b"a" * 39, "one nested deeper than 16"),
    (b")" + b"\x85" * 40, "one nested deeper than 16"),
    (b"]q\x00h\x00a", "one that names a container twice"),
    (b"\x8a\x10" + b"\x7f" * 16, "one with a number of more than 64 bits"),
])  # fmt: skip
def test_a_pickle_that_would_grow_is_refused(opcodes, found):
    assert message(lambda: cifar._unpickle("file", b"\x80\x02" + opcodes + b".")) == (
        f"file: expected a pickle of arrays, lists, strings and numbers, found {found}; get the official archive again"
    )


def test_a_pickle_of_many_parts_or_with_a_far_memo_takes_no_more_than_it_holds(monkeypatch):
    monkeypatch.setattr(cifar, "MOST_OPCODES", 50)
    assert "found one of more than 50 parts;" in message(lambda: cifar._unpickle("file", b"\x80\x02](" + b"N" * 60 + b"e."))
    assert cifar._unpickle("file", b"\x80\x02]r\xff\xff\xff\x7f.") == []  # Python's own would make room for 2³¹
    shared = b"\x80\x02N\x85" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(12)) + b"."
    value = cifar._unpickle("file", shared)  # 2¹² tuples by name, of 12 in memory; as a key of a dict it is refused
    assert value[0] is value[1]
    assert "a part of another kind, tuple" in message(lambda: cifar._unpickle("file", b"\x80\x02}" + b")N" + b"s."))


# --- drawn in processes, between processes ----------------------------------------------------------------------------


def drawn_in_workers(name="shaken"):
    return Config(
        data=DataConfig(f"own_tasks:{name}", workers=2), model=ModelConfig("own_tasks:points", "1", "linear"),
        clients=ClientsConfig(2), train=TrainConfig(epochs=2, batch_size=16, lr=0.05, threads=1), wire=WireConfig(timeout=20),
    )  # fmt: skip


def test_workers_draw_the_same_between_processes_as_in_one(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)  # where the processes find own_tasks
    train_in_both_runtimes(drawn_in_workers(), tmp_path)


def test_what_no_worker_can_be_given_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    settings = dataclasses.replace(drawn_in_workers("shaken_locally"), out=str(tmp_path / "run"))
    train(settings)  # forked, they have it
    with pytest.raises(HalfpassError) as refused:
        train(dataclasses.replace(settings, runtime="processes", out=str(tmp_path / "processes")))
    assert "data own_tasks:shaken_locally: expected a data set that can be sent to its workers, found " in str(refused.value)
    assert str(refused.value).endswith("; no lambda or local class in it, or no workers")


DRAWING = """
import os, sys, time
import torch
from own_tasks import shaken
from halfpass.data.batches import train_batches
from halfpass.data.own import from_datasets
from halfpass.data.workers import draw_beside_threads

if __name__ == "__main__":
    draw_beside_threads()
    data = from_datasets("own", *shaken(), workers=2)
    batches = train_batches(data, data.train, 4, seed=0, client=0, epoch=0)
    next(batches)
    print("drawn", flush=True)
    time.sleep(100)
"""


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    script = tmp_path / "drawing.py"
    script.write_text(DRAWING)
    here = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=here, start_new_session=True)

    def members():
        found = subprocess.run(["ps", "-o", "pid=", "-s", str(parent.pid)], capture_output=True, text=True).stdout
        return {int(pid) for pid in found.split()} - {parent.pid}

    assert parent.stdout.readline() == "drawn\n"
    try:
        assert len(members()) >= 3  # the fork server and two workers
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 10
    while left := members():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


# --- the run's samples ------------------------------------------------------------------------------------------------


def test_a_run_is_gone_on_with_and_tested_on_its_own_samples_alone(tmp_path, monkeypatch):
    """data() splits by a generator that no seed of ours reaches: resumed, it would train on what it tests on."""
    monkeypatch.chdir(Path(__file__).parent)
    kept = tmp_path / "kept"
    settings = dataclasses.replace(drawn_in_workers("split_anew"), data=DataConfig("own_tasks:split_anew"), out=str(kept))
    with monkeypatch.context() as patch:
        saved = RunFolder.save_checkpoint

        def then_stopped(*arguments):
            saved(*arguments)
            raise KeyboardInterrupt

        patch.setattr(RunFolder, "save_checkpoint", then_stopped)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    said = r"data own_tasks:split_anew: expected the run's training samples \(digest \w+\), found others \(digest \w+\); restore them; "
    with pytest.raises(InputError, match=said):
        resume(kept)
    done = tmp_path / "done"
    train(dataclasses.replace(settings, out=str(done)))
    with pytest.raises(InputError, match=r"expected the run's test samples \(digest \w+\), found others"):
        export(done)
    (done / "data.json").unlink()  # as of an older version
    assert export(done).accuracy is not None


def test_the_samples_of_a_seeded_split_are_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    out = tmp_path / "run"
    settings = dataclasses.replace(drawn_in_workers(), data=DataConfig("own_tasks:multilabel"), task=TaskConfig("multilabel"))
    train(dataclasses.replace(settings, model=ModelConfig("own_tasks:flat", "below", "linear"), out=str(out)))
    exported = export(out)
    assert exported.accuracy == exported.reported


SCRIPT = """
import sys
import torch
from torch import nn
from torch.utils.data import TensorDataset
import halfpass

def data():
    x = torch.randn(96, 6)
    y = (x[:, 0] > 0).long()
    return TensorDataset(x[:64], y[:64]), TensorDataset(x[64:], y[64:])

def network(shape, outputs):
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, outputs))

if __name__ == "__main__":
    print(halfpass.train(halfpass.Config(
        runtime=sys.argv[1], data=halfpass.DataConfig("__main__:data"), model=halfpass.ModelConfig("__main__:network", "1"),
        train=halfpass.TrainConfig(epochs=12, batch_size=16, threads=1), out=sys.argv[2],
    ))["test"]["accuracy"])
"""


def test_a_script_names_functions_of_its_own(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    words, here = [sys.executable, "script.py", "local", "run"], os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=here)
    assert float(done.stdout) > 0.7, done.stderr
    with pytest.raises(InputError) as refused:
        train(Config(runtime="processes", data=DataConfig("__main__:data"), out=str(tmp_path / "processes")))
    assert str(refused.value) == (
        "data.name: expected a module that other processes can import, found '__main__:data'; "
        "put it into a file, or set runtime local"
    )
    assert not (tmp_path / "processes").exists()


@pytest.mark.parametrize("topology", ["splitfed", "relay"])
def test_buffers_of_infinities_and_small_whole_numbers_are_handed_over(tmp_path, monkeypatch, topology):
    monkeypatch.chdir(Path(__file__).parent)
    settings = dataclasses.replace(
        drawn_in_workers(), data=DataConfig("own_tasks:shaken"), model=ModelConfig("own_tasks:buffered", "0", "linear"),
        clients=ClientsConfig(2, topology),
    )  # fmt: skip
    train_in_both_runtimes(settings, tmp_path)
    state = load_file(tmp_path / "local" / "client-0.safetensors")
    count = 2 * 3 if topology == "splitfed" else 2 * 2 * 3  # epochs × steps, and in a relay of both clients
    assert state["client_half.0.seen"].item() == count
    assert state["client_half.0.seen"].dtype == torch.int8
    assert state["client_half.0.steps"].tolist() == [count, 300 * count]
    assert state["client_half.0.mask"].isinf().sum() == 2


def test_arrays_that_lie_backwards_or_in_other_byte_order_are_read_as_they_are():
    rows = np.arange(24, dtype=np.float32).reshape(8, 3)
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    for view in (rows[::-1], rows[:, ::-1], rows[::-1].astype(">f4"), np.asfortranarray(rows)[::-1]):
        data = from_datasets("own", [(row, label) for row, label in zip(view, labels[::-1], strict=True)], Items([(rows[0], 0)]))
        assert torch.equal(data.train.inputs, torch.from_numpy(view.astype("<f4").copy()))
        assert data.train.labels.tolist() == labels[::-1].tolist()
