"""What comes from outside as JSON or YAML is bounded before objects are made of it. The cases are harmless in depth and
size: each is just beyond a bound."""

import json
import time

import pytest
import yaml

from halfpass import bounded
from halfpass.bounded import MOST_DEPTH, MOST_YAML_BYTES, parse_json, parse_yaml, read_text
from halfpass.commands.cli import main
from halfpass.commands.grid import read_grid, read_pairs
from halfpass.config import Config, as_dict
from halfpass.errors import InputError
from halfpass.report.runs import read_run
from halfpass.run.admission import _settings
from halfpass.run.records import read_config, read_result
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.store import UploadStore

DEEP = "[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1)
BOMB = "a: &a [1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 6)}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)
)
YAML = [
    (f"a: {DEEP}", "more than 32 levels"),
    ("- " * 33 + "1", "more than 32 levels"),
    (BOMB, "more than 20000 values"),
    ("[" + "1," * 20_000 + "]", "more than 20000 values"),
    ("#" * (MOST_YAML_BYTES + 1), "more than 131072 bytes"),
    ("a: &a [*a]", "*a inside of what it stands for"),
    ("train: {epochs: 010}", "010 in line 1, which YAML takes for 8: write 8, or quote a text"),
    ("train:\n  epochs: 1:30", "1:30 in line 2, which YAML takes for 90: write 90, or quote a text"),
    ("a: 1:30.5", "1:30.5 in line 1, which YAML takes for 90.5: write 90.5, or quote a text"),
    ("a: !!timestamp no", "a value that does not fit its tag ('NoneType' object has no attribute 'groupdict')"),
    ("a: !!int ''", "a value that does not fit its tag (string index out of range)"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), YAML)
def test_yaml_is_refused_at_once(text, said):
    began = time.monotonic()
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        parse_yaml(text)
    assert str(refused.value) == said
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("text", [
    yaml.safe_dump(as_dict(Config())), "a: &a {b: 1}\nc: *a", "a: '010'", "a: \"1:30\"", "a: 0", "a: 0.5", "a: 0x10", "a: 10:30 h",
    "a: [0, 00x]", "", "a: 127.0.0.1:7465",
])  # fmt: skip
def test_other_yaml_is_what_it_was(text):
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(("text", "said"), [
    (DEEP, "more than 32 levels"),
    ('{"a":' * 33 + "1" + "}" * 33, "more than 32 levels"),
    ("[" * 1000, "more than 32 levels"),
    ("[NaN]", "NaN, which is not a JSON number"),
    (" " * 101, "more than 100 bytes"),
])  # fmt: skip
def test_json_is_refused_at_once(text, said):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        parse_json(text, 100 if len(text) == 101 else 10_000)
    assert str(refused.value) == said


@pytest.mark.parametrize("value", [["[" * 100], {"\\": '"[[' * 40, "b": [[], {}]}, "\\\"[" * 40, [[] for _ in range(100)]])
def test_brackets_in_strings_are_no_depth(value):
    assert parse_json(json.dumps(value)) == value


def test_json_of_many_groups_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr(bounded, "MOST_JSON_GROUPS", 4)
    assert parse_json('[{}, [], {"[": "]"}]') == [{}, [], {"[": "]"}]
    with pytest.raises(ValueError, match=r"^more than 4 lists and objects$"):
        parse_json("[{}, [], {}, []")


def test_a_string_that_does_not_end_is_read_once():
    with pytest.raises(ValueError, match=r"^Unterminated string"):
        parse_json('"' + '\\"' * 200_000)


def test_no_more_of_a_file_is_read_than_may_be(tmp_path):
    (tmp_path / "a").write_text("12345")
    assert read_text(tmp_path / "a", 5) == "12345"
    with pytest.raises(ValueError, match=r"^more than 4 bytes$"):
        read_text(tmp_path / "a", 4)


def said_of(read, *arguments):
    with pytest.raises(InputError) as refused:
        read(*arguments)
    return str(refused.value)


def test_every_reader_is_bounded(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("config.yaml", "grid.yaml"):
        (tmp_path / name).write_text(BOMB)
    for name in ("result.json", "store.json"):
        (tmp_path / name).write_text(DEEP)
    (tmp_path / "metrics.jsonl").write_text(f"{DEEP}\n{DEEP}\n")
    bomb = "more than 20000 values"
    assert said_of(read_config, tmp_path) == f"{tmp_path}/config.yaml: expected the settings of a run, found {bomb}; restore the file, or run again"
    assert said_of(read_grid, tmp_path / "grid.yaml", tmp_path, {}) == f"{tmp_path}/grid.yaml: expected YAML, found {bomb}; correct it"
    assert said_of(read_pairs, "--set", [f"a={DEEP}"]) == f"--set: expected a value for a, found '{DEEP}' (more than 32 levels); correct it"
    assert said_of(read_pairs, "--set", ["a=010"]) == (
        "--set: expected a value for a, found '010' (010 in line 1, which YAML takes for 8: write 8, or quote a text); correct it"
    )
    assert said_of(read_result, tmp_path) == f"{tmp_path}/result.json: expected JSON, found more than 32 levels; restore the file, or run again"
    assert said_of(UploadStore.open_existing, tmp_path) == (
        f"store {tmp_path}: expected an undamaged store of uploads, found more than 32 levels; choose another folder for server.store"
    )
    assert said_of(_settings, "client 0 at joining", pb.Join(settings=DEEP)) == (
        f"client 0 at joining: expected settings as a JSON object, found '{DEEP[:40]}'; use halfpass join"
    )
    assert main(["train", "--config", "grid.yaml"]) == 2
    assert capsys.readouterr().err == f"halfpass: config: expected valid YAML in grid.yaml, found {bomb}; correct the file\n"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(as_dict(Config())))
    assert said_of(read_run, tmp_path) == f"{tmp_path}/metrics.jsonl:1: expected a JSON row, found more than 32 levels; remove the line"
    assert read_config(tmp_path) == Config()


def test_what_is_written_fits(monkeypatch):
    monkeypatch.setattr(bounded, "MOST_DEPTH", 3)
    assert parse_yaml(yaml.safe_dump(as_dict(Config()))) == as_dict(Config())
