"""`halfpass new`: what it writes trains as it is, and nothing that is there is touched."""

import errno
import fnmatch
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from halfpass.commands import new
from halfpass.commands.cli import main
from halfpass.config import Config, as_dict, flatten

MODULES = ("my_data", "my_network", "my_task", "test_mine")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A new folder, in which this process then is; its modules are gone behind the test."""
    new.new_folder(tmp_path / "first")
    monkeypatch.chdir(tmp_path / "first")
    monkeypatch.setattr("sys.path", [str(tmp_path / "first"), *sys.path])
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path / "first"
    for name in MODULES:
        sys.modules.pop(name, None)


def test_the_folder_trains_by_its_own_readme(folder, capsys):
    assert main(["train", "--config", "run.yaml", "--train.epochs", "2", "--out", "runs/one"]) == 0
    result = json.loads((folder / "runs/one/result.json").read_text())
    assert result["test_accuracy"] > 0.3
    assert result["clients"] == 2
    said = capsys.readouterr()
    assert "report: runs/one/report.html" in said.out
    for command in re.findall(r"halfpass (\w+) ", (folder / "README.md").read_text()):
        assert command in ("train", "check", "cuts", "certs", "serve", "join")


def test_its_own_tests_pass_and_can_fail(folder, tmp_path):
    own = importlib.import_module("test_mine")
    own.test_the_halves_compute_what_the_whole_network_does()
    own.test_a_short_training_is_better_than_guessing(tmp_path, "my_task:task")
    split = own.halfpass.split

    def other(*given):
        halves = split(*given)
        for parameter in halves.server.parameters():
            parameter.data += 1
        return halves

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(own.halfpass, "split", other)
        with pytest.raises(AssertionError):
            own.test_the_halves_compute_what_the_whole_network_does()


def test_its_settings_are_few_known_and_explained(folder):
    text = (folder / "run.yaml").read_text()
    settings = flatten(yaml.safe_load(text))
    assert settings.keys() <= flatten(as_dict(Config())).keys()
    assert len(settings) <= 12
    lines = [line for line in text.splitlines() if re.search(r": \S", line.partition("#")[0])]
    assert len(lines) == len(settings)
    assert all("  # " in line for line in lines)


def test_its_code_is_clean(folder):
    said = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,I,B,UP", "--line-length", "120", "."], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout


def test_the_template_is_in_the_package():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["halfpass"]
    for name in new.template():
        assert any(fnmatch.fnmatch(f"commands/template/{name}", pattern) for pattern in patterns)


def test_what_is_there_stays(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    for name, said in (
        ("full", f"halfpass: DIR: expected a new or an empty folder, found mine.txt in {tmp_path}/full; choose another name\n"),
        ("file", f"halfpass: DIR: expected a folder, found a file at {tmp_path}/file; choose another name\n"),
    ):  # fmt: skip
        assert main(["new", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err == said
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "full", "mine.txt"]
    (tmp_path / "empty").mkdir()
    assert main(["new", str(tmp_path / "empty")]) == 0
    said = capsys.readouterr().out
    assert "halfpass train --config run.yaml" in said
    assert {file.name for file in (tmp_path / "empty").iterdir()} == new.template().keys()


def test_a_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch):
    write = Path.write_bytes

    def full(file, content):
        if "my_task" in file.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["new", str(tmp_path / "first")]) == 1
    assert capsys.readouterr().err.endswith("No space left on device; make room there\n")
    assert list((tmp_path / "first").iterdir()) == []
