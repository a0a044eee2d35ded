"""Settings as given in Python: the same plain values, in the same ranges, as those of the command line."""

import dataclasses
import enum
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from halfpass import train
from halfpass.commands.cli import main
from halfpass.config import (
    _GROUPS,
    ClientsConfig,
    Config,
    DataConfig,
    ModelConfig,
    ServerConfig,
    TrainConfig,
    WireConfig,
    as_dict,
    flatten,
    from_dict,
)
from halfpass.errors import InputError


class Word(enum.StrEnum):
    RELAY = "relay"


@pytest.mark.parametrize(("given", "plain"), [
    (TrainConfig(lr=np.float64(0.05)), TrainConfig(lr=0.05)),
    (TrainConfig(lr=torch.tensor(0.5)), TrainConfig(lr=0.5)),
    (TrainConfig(lr=1, momentum="5e-1"), TrainConfig(lr=1.0, momentum=0.5)),
    (TrainConfig(epochs=np.int64(3), seed=torch.tensor(7), threads=np.uint8(2)), TrainConfig(epochs=3, seed=7, threads=2)),
    (TrainConfig(nesterov=np.bool_(False), compile=torch.tensor(True)), TrainConfig(nesterov=False, compile=True)),
    (ModelConfig(name=np.str_("resnet20")), ModelConfig(name="resnet20")),
    (ClientsConfig(topology=Word.RELAY), ClientsConfig(topology="relay")),
    (DataConfig(path=Path("a") / "b"), DataConfig(path="a/b")),
    (ServerConfig(store=Path("s")), ServerConfig(store="s")),
])  # fmt: skip
def test_scalars_and_paths_become_plain_values(given, plain):
    assert given == plain
    for field in dataclasses.fields(given):
        assert type(getattr(given, field.name)) is type(getattr(plain, field.name))
    assert yaml.safe_load(yaml.safe_dump(dataclasses.asdict(given))) == dataclasses.asdict(plain)


def test_a_run_of_such_settings_is_written_and_read_back(tmp_path):
    config = Config(
        data=DataConfig(limit=np.int32(64)), train=TrainConfig(lr=np.float64(0.05), epochs=1, batch_size=np.int64(32)),
        out=tmp_path / "run",
    )  # fmt: skip
    train(config)
    assert from_dict(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())).train.lr == 0.05


@pytest.mark.parametrize(("make", "said"), [
    (lambda: TrainConfig(lr=torch.ones(2)), "train.lr: expected a number, found tensor([1., 1.]); correct it"),
    (lambda: TrainConfig(lr=torch.ones((), device="meta")), "train.lr: expected a number, found tensor(..., device='meta', size=()); correct it"),
    (lambda: TrainConfig(lr=True), "train.lr: expected a number, found True; correct it"),
    (lambda: TrainConfig(lr="fast"), "train.lr: expected a number, found 'fast'; correct it"),
    (lambda: TrainConfig(lr=10**400), f"train.lr: expected a number, found {str(10**400)[:80]}…; correct it"),
    (lambda: TrainConfig(lr=float("inf")), "train.lr: expected a finite number, found inf; correct it"),
    (lambda: TrainConfig(epochs=3.0), "train.epochs: expected a whole number, found 3.0; correct it"),
    (lambda: TrainConfig(epochs=True), "train.epochs: expected a whole number, found True; correct it"),
    (lambda: TrainConfig(nesterov=1), "train.nesterov: expected true or false, found 1; correct it"),
    (lambda: TrainConfig(threads="2"), "train.threads: expected a whole number or null, found '2'; correct it"),
    (lambda: Config(train={"lr": 1}), "train: expected a TrainConfig, found {'lr': 1}; correct it"),
    (lambda: Config(train=DataConfig), "train: expected a TrainConfig, found <class 'halfpass.config.DataConfig'>; correct it"),
    (lambda: Config(out=b"run"), "out: expected text or null, found b'run'; correct it"),
    (lambda: Config(out="a\0b"), r"out: expected text without null bytes, found 'a\x00b'; correct it"),
    (lambda: Config(method=["decoupled"]), "method: expected text, found ['decoupled']; correct it"),
    (lambda: WireConfig(window=3_000_000_000), "wire.window: expected a number of at most 2146435071, found 3000000000; change it"),
    (lambda: WireConfig(timeout=1e300), "wire.timeout: expected a number of at most 1000000, found 1e+300; change it"),
    (lambda: TrainConfig(seed=2**63), "train.seed: expected a whole number of 64 bits, found 9223372036854775808; correct it"),
    (lambda: TrainConfig(epochs=2**32), "train.epochs: expected a number of at most 2147483647, found 4294967296; change it"),
    (lambda: ClientsConfig(count=10**9), "clients.count: expected a number of at most 65536, found 1000000000; change it"),
    (lambda: ServerConfig(store_limit=2**64), "server.store_limit: expected a whole number of 64 bits, found 18446744073709551616; correct it"),
])  # fmt: skip
def test_what_is_no_plain_value_in_range_is_refused(make, said):
    with pytest.raises(InputError) as refused:
        make()
    assert str(refused.value) == said


def test_every_field_is_checked():
    for group, made in {"": Config, **_GROUPS}.items():
        for field in dataclasses.fields(made):
            with pytest.raises(InputError, match=rf"^{group}{'.' if group else ''}{field.name}: expected "):
                made(**{field.name: object()})


LARGE = {
    "train.seed": 2**63 - 1, "train.test_every": 2**62, "train.micro_batch": 2**62, "wire.budget": 2**62,
    "wire.window": 2**31 - 1 - 2**20, "wire.timeout": 1e6, "server.store_limit": 2**62, "clients.alpha": 1e9,
}  # fmt: skip


@pytest.mark.parametrize("runtime", ["local", "processes"])
def test_the_largest_values_train(tmp_path, runtime):
    settings = {
        "data.limit": 64, "train.batch_size": 32, "train.epochs": 1, "train.threads": 1, "server.replay": 2,
        "clients.partition": "dirichlet", **LARGE,
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert main(["train", *words, "--runtime", runtime, "--out", str(tmp_path / "run")]) == 0


def test_a_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    paths = [name for name, value in flatten(as_dict(Config())).items() if name.rpartition(".")[2] in ("path", "store", "out")]
    assert paths == ["data.path", "server.store", "out"]
    config = flatten(as_dict(from_dict({name: f"~/{name}" for name in paths})))
    assert [config[name] for name in paths] == [str(tmp_path / name) for name in paths]
    with pytest.raises(InputError) as refused:
        Config(out="~nobody-of-that-name/run")
    assert str(refused.value) == (
        "out: expected a path, or the home folder of a user, found '~nobody-of-that-name/run'; correct it, or write ./~"
    )
    assert Config(out="./~").out == "./~"
