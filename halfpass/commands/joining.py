"""The command that `halfpass serve` prints: a client types it as it stands. Tests: tests/test_start.py."""

import shlex
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from halfpass.bounded import MOST_YAML_BYTES, parse_yaml, read_text
from halfpass.config import Config, as_dict, flatten, shared_settings
from halfpass.run.credentials import SERVER, trust_of
from halfpass.wire.service import LOOPBACK_HOSTS

EVERYWHERE = ("0.0.0.0", "[::]")  # all addresses of a machine, none of which a client can call by that


def join_command(config: Config, address: str, *, insecure: bool, files: Sequence[str] = ()) -> str:
    """Of a server that listens there, with settings of `files` and others. Each client has its own number."""
    host, _, port = address.rpartition(":")
    reached = f"{_name_of(config)}:{port}" if host in EVERYWHERE else address
    words = ["halfpass", "join", reached, *(word for file in files for word in ("--config", file))]
    words += [word for key, value in _said(config, files).items() for word in (f"--{key}", _text(value))]
    words += ["--client", "0"]
    if config.tls.folder is not None:
        words += ["--tls.folder", config.tls.folder]
    if insecure and host not in LOOPBACK_HOSTS:
        words += ["--insecure"]
    more = f"; the others have --client 1 to {config.clients.count - 1}" if config.clients.count > 1 else ""
    return shlex.join(words) + more


def _said(config: Config, files: Sequence[str]) -> dict[str, Any]:
    """What both sides must know, and the files do not say."""
    known = flatten(as_dict(Config()))
    for file in files:
        if Path(file).is_file():
            known |= flatten(parse_yaml(read_text(Path(file), MOST_YAML_BYTES)))
    needed = shared_settings(config)
    settings = flatten(as_dict(config))
    return {key: value for key, value in settings.items()
            if (key in needed or key.startswith("data.")) and value != known.get(key)}  # fmt: skip


def _text(value: object) -> str:
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]


def _name_of(config: Config) -> str:
    """The name of this machine in its certificate, or as it calls itself."""
    trust = trust_of(config.tls, SERVER)
    hosts = [] if trust is None else trust.hosts()
    return next((host for host in hosts if host not in ("localhost", "127.0.0.1", "::1")), socket.gethostname())
