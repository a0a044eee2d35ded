"""A server process, one process per client, and an edge's where there is one, started, watched and stopped by this one.

They are `halfpass serve` and `halfpass join`, just as one would type them on different machines.
"""

import contextlib
import subprocess
import time
from pathlib import Path
from typing import Any

from halfpass.config import Config
from halfpass.errors import PassedOnError, RunError
from halfpass.run.children import Child, stopping
from halfpass.run.records import read_result

START_SECONDS = 120.0  # for the server to listen; PyTorch can take long to load from a cold disk
LAST_WORD_SECONDS = 3.0  # for the server, which knows why a client that had joined failed, to say so and end
SAVE_SECONDS = 60.0  # for the clients to end after the server


def train_processes(config: Config, folder: Path, *, debug: bool = False, again: bool = False) -> dict[str, Any]:
    """Trains by a split method between processes; `folder` holds `config.yaml`. Returns what `result.json` holds.
    `again`: goes on with what is in it.

    Raises PassedOnError when a process fails; the others are stopped then.
    """
    common = ["--config", str(folder / "config.yaml"), *(["--debug"] if debug else [])]
    common += ["--out", str(folder), *(["--resume"] if again else [])]
    anywhere = ["--bind", "127.0.0.1:0"]
    silent = ["--log.json", "false", "--metrics.port", "null"]  # who watches the run, watches its server
    children = [Child("server", ["serve", *common, *anywhere], pipe=True)]
    common += silent
    with stopping(children):
        address = _address(children[0])
        if config.model.edge_cut is not None:
            common += ["--out", str(folder / "edge")]
            children.append(Child("edge", ["serve", *common, *anywhere, "--above", address], quiet=True, pipe=True))
            address = _address(children[-1])
        for k in range(config.clients.count):
            children.append(Child(f"client {k}", ["join", address, "--client", str(k), *common], quiet=not debug))
        _watch(children)
    return read_result(folder)


def _address(server: Child) -> str:
    """Where the server listens, from its first line: `listening on HOST:PORT …`."""
    words = server.first_line(START_SECONDS).split()
    if words[:2] == ["listening", "on"]:
        return words[2]
    if server.status() is not None:
        raise server.failure()
    raise RunError("server process", f"a line that says its address within {START_SECONDS:g} s", "none", "try again")


def _watch(children: list[Child]) -> None:
    """Until all have ended well; raises as soon as one has not."""
    server, *clients = children
    ended: float | None = None
    while any(child.status() is None for child in children):
        failed = [client for client in clients if client.status()]
        if failed:
            raise _failure(server, failed[0])
        if server.status():
            raise next((client for client in clients if client.killed), server).failure()
        if server.status() == 0:
            ended = ended or time.monotonic()
            if time.monotonic() - ended > SAVE_SECONDS:
                slow = next(client.name for client in clients if client.status() is None)
                expected = f"its end within {SAVE_SECONDS:g} s of the server's"
                raise RunError(slow, expected, "none", "look at what it does")
        time.sleep(0.05)
    for child in children:
        if child.status():
            raise child.failure()


def _failure(server: Child, client: Child) -> PassedOnError:
    """Of a failed client: the server's line, where the client could still tell it why, and else the client's own."""
    if client.killed:
        return client.failure()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(LAST_WORD_SECONDS)
        return server.failure() if server.status() else client.failure()
    server.process.terminate()  # it still waits for the client to join, or is about to end
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(LAST_WORD_SECONDS)
    return server.failure() if server.status() in (1, 2) else client.failure()
