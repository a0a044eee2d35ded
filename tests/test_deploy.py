"""examples/deploy: units, image and compose file say what halfpass and their tools understand, and the run they start
works. The tools themselves are asked where they are installed."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path

import commands
import pytest
import yaml

from halfpass.commands.cli import _parse

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "examples" / "deploy"
UNITS = ["halfpass-server.service", "halfpass-client@.service"]
INSTRUCTIONS = {  # https://docs.docker.com/reference/dockerfile/
    "ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "ONBUILD", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
}  # fmt: skip
FOLDER = "/authority", "/keys"  # of the service that makes certificates


def unit(name):
    parser = RawConfigParser(strict=False, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str
    parser.read_string((DEPLOY / name).read_text())
    return {section: dict(parser[section]) for section in parser.sections()}


def unit_command(name):
    """Its words, specifiers and variables filled in."""
    service = unit(name)["Service"]
    command = service["ExecStart"].replace("%i", "0")
    for setting in service.get("Environment", "").split():
        variable, _, value = setting.partition("=")
        command = command.replace(f"${{{variable}}}", value)
    assert not re.search(r"[%$]", command)
    return shlex.split(command)


def compose():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def compose_command(name):
    return ["halfpass", *shlex.split(compose()["services"][name]["command"])]


COMMANDS = [
    *[pytest.param(lambda name=name: unit_command(name), id=name) for name in UNITS],
    *[pytest.param(lambda name=name: compose_command(name), id=name) for name in ("server", "client-0", "client-1")],
]


def parsed(words):
    """By the command line's own parser, /config.yaml and the like being the one of the folder."""
    assert words[-1] == "--resume"
    words = words[1:]
    words = [str(DEPLOY / "config.yaml") if word.endswith("/config.yaml") else word for word in words]
    return _parse(words)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_one_of_halfpass(command):
    words = command()
    options = parsed(words)
    chosen = options[options.subcommand]
    assert words[0].endswith("halfpass")
    assert chosen.config_object.clients.count == 2
    assert chosen.config_object.method == "decoupled"
    assert chosen.config_object.tls.folder.endswith("keys")
    assert chosen.config_object.out.startswith(("/var/lib/halfpass/", "/runs/"))
    assert chosen.insecure is False
    if options.subcommand == "join":
        assert chosen.address.endswith(":7465")
        assert f"client-{chosen.client}" in chosen.config_object.out
    else:
        assert chosen.bind == "0.0.0.0:7465"


@pytest.mark.parametrize("name", UNITS)
def test_units_start_again_and_leave_time_to_stop(name):
    service = unit(name)["Service"]
    assert service["Restart"] == "on-failure"
    assert service["TimeoutStopSec"] == "15"  # the server needs up to 10
    assert service["User"] == "halfpass"
    assert service["ProtectSystem"] == "strict"
    assert "/var/lib/halfpass/" in service["ExecStart"]  # all that is written is in the folder that stays writable
    assert service["StateDirectory"] == "halfpass"
    assert "MemoryDenyWriteExecute" not in service


@pytest.fixture
def units(tmp_path):
    """Copies that name a program which is here."""
    for name in UNITS:
        text = (DEPLOY / name).read_text()
        assert "/opt/halfpass/bin/halfpass " in text
        (tmp_path / name).write_text(text.replace("/opt/halfpass/bin/halfpass", sys.executable))
    return tmp_path


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_takes_the_units(units, name):
    done = subprocess.run(["systemd-analyze", "verify", units / name], capture_output=True, text=True)
    about = [line for line in done.stderr.splitlines() if "halfpass" in line]
    assert (done.returncode, about) == (0, []), done.stderr
    (units / name).write_text((units / name).read_text().replace("Restart=on-failure", "Restart=sometimes"))
    done = subprocess.run(["systemd-analyze", "verify", units / name], capture_output=True, text=True)
    assert "sometimes" in done.stderr  # it looks
    checked = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=25", units / name], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr  # an exposure of 2.5 of 10 at most


def test_the_image_has_known_instructions_and_another_user_than_root():
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert {word for word, _ in lines} <= INSTRUCTIONS
    assert lines[0] == ["FROM", "python:3.11-slim"]
    last = dict(lines)
    assert last["USER"] == "10001"
    assert "--uid 10001 " in last["RUN"]
    assert last["VOLUME"] == "/runs"
    assert json.loads(last["ENTRYPOINT"]) == ["halfpass"]
    assert "--constraint constraints.txt" in text
    assert re.search("^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    sources = [name for word, rest in lines if word == "COPY" for name in rest.split()[:-1]]
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for name in sources:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint")
def test_hadolint_takes_the_image():
    done = subprocess.run(["hadolint", DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_compose_file_has_a_server_and_two_clients_with_keys_of_their_own():
    content = compose()
    assert set(content["services"]) == {"server", "client-0", "client-1", "certs"}
    made = {volume.partition(":")[0] for volume in content["services"]["certs"]["volumes"]}
    assert content["services"]["certs"]["profiles"] == ["setup"]
    for name in ("server", "client-0", "client-1"):
        service = content["services"][name]
        mounted = dict(volume.split(":")[:2] for volume in service["volumes"])
        assert mounted == {"./config.yaml": "/config.yaml", f"{name}-keys": "/keys", f"{name}-runs": "/runs"}
        assert f"{name}-keys" in made
        assert service["restart"] == "on-failure"
        assert service["stop_grace_period"] == "15s"
        assert service["read_only"] is True
        assert "user" not in service  # the image's
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    named = {volume.split(":")[0] for service in content["services"].values() for volume in service["volumes"]}
    assert named - {"./config.yaml"} == set(content["volumes"])


def test_clients_wait_for_a_server_that_answers():
    services = compose()["services"]
    asked = services["server"]["healthcheck"]["test"]
    assert asked[:2] == ["CMD", "halfpass"]
    options = _parse(asked[2:])
    assert options.subcommand == "status"
    assert options["status"].address == "server:7465"  # the name that `certs` gives it
    assert "--hosts server" in services["certs"]["command"][0]
    for name in ("client-0", "client-1"):
        assert services[name]["depends_on"] == {"server": {"condition": "service_healthy"}}


def test_compose_takes_the_file():
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode != 0:
        pytest.skip("needs docker compose")
    file = str(DEPLOY / "compose.yaml")
    done = subprocess.run([docker, "compose", "--file", file, "config", "--quiet"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """What the service `certs` makes: its own script, in folders that are here, by the halfpass that is tested."""
    tmp_path = tmp_path_factory.mktemp("deploy")
    (script,) = compose()["services"]["certs"]["command"]
    script = script.replace("$$", "$").replace("--owner 10001 ", "")  # which is root's to do
    for folder in FOLDER:
        script = script.replace(f"{folder}", str(tmp_path / folder.strip("/")))
    script = script.replace("halfpass certs", f"{shlex.quote(sys.executable)} -m halfpass certs")
    for name in ("server", "client-0", "client-1"):
        (tmp_path / "keys" / name).mkdir(parents=True)
    subprocess.run(["sh", "-ec", script], check=True, cwd=ROOT, capture_output=True)
    return tmp_path / "keys"


def test_each_gets_its_own_keys(keys):
    for name in ("server", "client-0", "client-1"):
        files = sorted((keys / name).iterdir())
        assert [file.name for file in files] == sorted(["authority.pem", f"{name}.pem", f"{name}-key.pem"])
        assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    assert (keys.parent / "authority" / "authority-key.pem").exists()


def test_server_and_clients_train_by_these_commands_and_keys(keys, tmp_path):
    def start(name, address):
        words = compose_command(name)
        for there, here in (
            ("0.0.0.0:7465", "127.0.0.1:0"), ("server:7465", address), ("/config.yaml", str(DEPLOY / "config.yaml")),
            ("/keys", str(keys / name)), (f"/runs/{name}", str(tmp_path / name)),
        ):  # fmt: skip
            words = [here if word == there else word for word in words]
        return commands.Command([*words[1:], "--train.epochs", "1", "--train.threads", "1"], ROOT)

    running = [start("server", "")]
    try:
        address = re.search(r"join (\S+)", running[0].stdout.readline())[1]
        running += [start(name, address) for name in ("client-0", "client-1")]
        ended = [process.communicate(timeout=120) for process in reversed(running)]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0, 0], ended
    result = json.loads((tmp_path / "server" / "result.json").read_text())
    assert result["test_accuracy"] > 0.5
    assert (tmp_path / "client-1" / "client-1.safetensors").exists()
