"""The wheel and the sdist: nothing is forgotten, and what is installed from them works away from the repository.

The environment of the wheel is new, but has its dependencies from the one of the tests, which are compared with the
wheel's metadata. `make dist-check` installs them anew (HALFPASS_CLEAN_INSTALL), in minutes.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
CLEAN = bool(os.environ.get("HALFPASS_CLEAN_INSTALL"))
ALIKE = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}  # seconds: wheels with the same times in them
NOT_IN_SDIST = (".ci/", ".git")  # what begins so is of no use without git


def run(*words, folder, env=None, seconds=300):
    done = subprocess.run(list(map(str, words)), cwd=folder, env=env, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tracked():
    """Files that git has, or that are new and not ignored, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository with git")
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", folder=ROOT).split("\0")
    return sorted(name for name in names if name and (ROOT / name).is_file())


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the sdist and the wheel made of it, and in `direct` the wheel made of the sources themselves."""
    work = tmp_path_factory.mktemp("dist")
    source = work / "source"
    for name in tracked():  # a copy, because setuptools writes beside its sources
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    (source / "halfpass" / "__pycache__").mkdir()
    (source / "halfpass" / "__pycache__" / "cut.cpython-311.pyc").write_bytes(b"not to be shipped")
    build = sys.executable, "-m", "build", "--no-isolation", "--outdir"
    run(*build, work, source, folder=work, env=ALIKE)
    run(*build, work / "direct", "--wheel", source, folder=work, env=ALIKE)
    return work


@pytest.fixture(scope="module")
def wheel(dist):
    (found,) = dist.glob("*.whl")
    return found


def test_every_file_of_the_package_is_in_the_wheel_and_no_other(wheel):
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {name for name in tracked() if name.startswith("halfpass/")}
    assert {"halfpass/py.typed", "halfpass/wire/halfpass.proto", "halfpass/report/page.html.j2"} <= expected
    assert shipped == expected


def test_the_sdist_is_the_repository(dist):
    (file,) = dist.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert [name for name in tracked() if name not in names and not name.startswith(NOT_IN_SDIST)] == []
    assert [name for name in names if name.endswith(".pyc") or "node_modules/" in name] == []


def test_the_sdist_makes_the_same_wheel_as_the_repository(dist, wheel):
    (direct,) = (dist / "direct").iterdir()
    assert direct.name == wheel.name
    one, other = (
        {info.filename: (info.CRC, info.date_time) for info in zipfile.ZipFile(file).infolist()} for file in (wheel, direct)
    )
    assert one == other


def test_metadata_say_what_pyproject_says(dist, wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(wheel) as archive:
        folder = f"halfpass-{project['version']}.dist-info"
        said = message_from_bytes(archive.read(f"{folder}/METADATA"))
        assert archive.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert (said["Name"], said["Version"], said["License-Expression"]) == ("halfpass", project["version"], "Apache-2.0")
    assert said["Requires-Python"] == project["requires-python"]
    assert said.get_all("Classifier") == project["classifiers"]
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload(decode=True).decode().strip() == (ROOT / "README.md").read_text().strip()
    for wanted in map(Requirement, said.get_all("Requires-Dist")):
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            assert wanted.specifier.contains(metadata.version(wanted.name)), f"{wanted} is not what the tests run with"
    checked = run(sys.executable, "-m", "twine", "check", "--strict", *dist.glob("halfpass-*"), folder=dist)
    assert checked.count("PASSED") == 2


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A new environment with the wheel: the folder of its commands, and another one to be in."""
    work = tmp_path_factory.mktemp("installed")
    new = work / "venv"
    run(sys.executable, "-m", "venv", *([] if CLEAN else ["--without-pip"]), new, folder=work)
    if CLEAN:
        constraint = "--constraint", ROOT / "constraints.txt"
        run(new / "bin" / "pip", "install", *constraint, wheel, folder=work, seconds=1800)
    else:
        (site,) = new.glob("lib/python*/site-packages")
        (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
        pip = sys.executable, "-m", "pip", "--python", new / "bin" / "python", "install", "--no-index", "--no-compile"
        run(*pip, "--ignore-installed", "--no-deps", wheel, folder=work)
    (work / "elsewhere").mkdir()
    return new / "bin", work / "elsewhere"


def test_what_is_installed_trains_and_reports_away_from_the_repository(installed):
    commands, elsewhere = installed
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HALFPASS"))}
    where = "import halfpass; print(halfpass.__file__)"
    own = run(commands / "python", "-c", where, folder=elsewhere, env=env)
    assert own.startswith(str(commands.parent)), own
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run(commands / "halfpass", "--version", folder=elsewhere, env=env) == f"halfpass {version}\n"
    train = "train", "--data.limit", "200", "--train.epochs", "1", "--train.threads", "1", "--out", "runs/first"
    run(commands / "halfpass", *train, folder=elsewhere, env=env)
    run(commands / "halfpass", "report", "runs/first", folder=elsewhere, env=env)
    result = json.loads((elsewhere / "runs" / "first" / "result.json").read_text())
    assert result["bytes"]["up"]["activations"] > 0
    assert "</html>" in (elsewhere / "runs" / "first" / "report.html").read_text()
