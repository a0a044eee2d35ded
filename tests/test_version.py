"""release/version.py: one command sets the version in every file, and refuses what is none."""

import importlib.util
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FILES = "pyproject.toml", "CITATION.cff", "CHANGELOG.md"


def load():
    spec = importlib.util.spec_from_file_location("version", ROOT / "release" / "version.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path):
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / name)
    text = (tmp_path / "CHANGELOG.md").read_text()
    (tmp_path / "CHANGELOG.md").write_text(text.replace("## [Unreleased]\n", "## [Unreleased]\n\n- Something new.\n", 1))
    (tmp_path / "pyproject.toml").write_text(re.sub('(?m)^version = .*$', 'version = "0.4.1"', (ROOT / "pyproject.toml").read_text()))
    return tmp_path


def texts(root):
    return {name: (root / name).read_text() for name in FILES}


def test_the_files_agree():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]\n" in changelog
    released = re.findall(r"^## \[(\d.*?)\] - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)
    assert released[:1] in ([], [version])


def test_a_version_is_set_in_every_file(root, monkeypatch, capsys):
    release = load()
    monkeypatch.setattr(release, "ROOT", root)
    assert release.main(["0.5.0", "2027-01-31"]) == 0
    assert tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"] == "0.5.0"
    cited = yaml.safe_load((root / "CITATION.cff").read_text())
    assert (cited["version"], str(cited["date-released"])) == ("0.5.0", "2027-01-31")
    changelog = (root / "CHANGELOG.md").read_text()
    assert "## [Unreleased]\n\n## [0.5.0] - 2027-01-31\n\n- Something new.\n" in changelog
    assert "git tag v0.5.0" in capsys.readouterr().out
    changed = {name: text for name, text in texts(root).items()}
    assert release.main(["0.5.1", "2027-02-01"]) == 2  # nothing is new
    assert capsys.readouterr().err == "CHANGELOG.md: expected a list below '## [Unreleased]', found none; say what is new\n"
    assert texts(root) == changed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "version: expected one as 0.2.0 or 0.2.0rc1, found 'nonsense'; give V=0.2.0"),
        (["0.5"], "version: expected three numbers, as 0.2.0 or 0.2.0rc1, found '0.5'; give V=0.2.0"),
        (["v0.5.0"], "version: expected three numbers, as 0.2.0 or 0.2.0rc1, found 'v0.5.0'; give V=0.2.0"),
        (["0.5.0.dev1"], "version: expected three numbers, as 0.2.0 or 0.2.0rc1, found '0.5.0.dev1'; give V=0.2.0"),
        (["0.4.0"], "version: expected one after 0.4.1, or 0.4.1 where that is not released, found 0.4.0"),
        (["0.5.0", "2027-02-30"], "day: expected one as 2026-12-01, found '2027-02-30'; leave it out for today"),
        ([], "arguments: expected a version and perhaps a day, found 0; give V=0.2.0"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_and_changes_nothing(words, said, root, monkeypatch, capsys):
    release = load()
    monkeypatch.setattr(release, "ROOT", root)
    before = texts(root)
    assert release.main(words) == 2
    assert capsys.readouterr().err == said + "\n"
    assert texts(root) == before


def test_a_released_version_is_not_released_again(root, monkeypatch, capsys):
    release = load()
    monkeypatch.setattr(release, "ROOT", root)
    assert release.main(["0.4.1", "2027-01-31"]) == 0  # the one that is being made
    assert release.main(["0.4.1", "2027-01-31"]) == 2
    assert "expected one after 0.4.1" in capsys.readouterr().err


def test_a_file_without_its_version_is_named(root, monkeypatch, capsys):
    release = load()
    monkeypatch.setattr(release, "ROOT", root)
    (root / "CITATION.cff").write_text("title: none\n")
    assert release.main(["0.5.0"]) == 2
    assert capsys.readouterr().err == "CITATION.cff: expected one line with the version, found 0; mend the file\n"
