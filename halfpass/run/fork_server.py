"""A process that has imported what children need, and forks them: PyTorch takes seconds to import, a fork none.

A command starts one with its first child, and it ends with the command. It runs nothing of its own: it has one thread,
has never used a GPU, and holds no data. Where there is none, children are started the usual way (`children.py`).
"""

import gc
import importlib
import json
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import setproctitle
import torch

CHILD = "HALFPASS_CHILD"  # a variable that is set for children alone
START_SECONDS = 120.0  # for the fork server; PyTorch can take long to load from a cold disk
LARGEST = 2**20  # bytes of a request: words and environment
IMPORTED = (  # ours, and what others would import when it is first used
    "halfpass.commands.cli", "halfpass.tasks.metrics", "sklearn.datasets", "torch._dynamo",
    "torch.fx.experimental.symbolic_shapes",
)  # fmt: skip
FORKS = sys.platform == "linux"  # elsewhere a fork of a process with so many libraries may crash


class Forked:
    """A forked child, as `subprocess.Popen` would give it."""

    def __init__(self, pid: int, link: socket.socket, stdin: IO[str], stdout: IO[str] | None) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self.returncode: int | None = None
        self._link = link

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status; raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            with selectors.DefaultSelector() as ready:
                ready.register(self._link, selectors.EVENT_READ)
                if not ready.select(timeout):
                    raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            status = self._link.recv(64)
            if not status:  # the fork server is gone
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
            self.returncode = int(status) if status else -signal.SIGKILL
            self._link.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


_lock = threading.Lock()
_link: socket.socket | None = None  # to the fork server, of this process or, in a forked child, of the one above
_server: "subprocess.Popen[bytes] | None" = None


def fork(arguments: Sequence[str], *, stdout: int | None, stderr: int | None) -> Forked | None:
    """A new child that runs the `halfpass` command with those arguments; `stdout` is a descriptor, subprocess.PIPE or
    None for this process's own, `stderr` a descriptor or None. None where there is no fork server."""
    if not FORKS or not _all_open():
        return None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # number and end come apart
    stdin_read, stdin_write = os.pipe()
    stdout_read, stdout_write = os.pipe() if stdout == subprocess.PIPE else (None, 1 if stdout is None else stdout)
    files = [theirs.fileno(), stdin_read, stdout_write, 2 if stderr is None else stderr]
    request = {
        "arguments": list(arguments), "folder": str(Path.cwd()),
        "path": [entry for entry in sys.path if isinstance(entry, str)],
        "environment": os.environ | {CHILD: "1"},
    }  # fmt: skip
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):  # it may be closed, or another thing
            stream.flush()
    try:
        start()
        assert _link is not None
        with _lock:
            socket.send_fds(_link, [json.dumps(request).encode()], files)
        theirs.close()
        ours.settimeout(START_SECONDS)
        pid = ours.recv(64)
    except OSError:  # a child that came all the same would end at once, for its standard input is closed
        pid = b""
    finally:
        theirs.close()
        os.close(stdin_read)
        if stdout_read is not None:
            os.close(stdout_write)
    if not pid:
        ours.close()
        for descriptor in (stdin_write, stdout_read):
            if descriptor is not None:
                os.close(descriptor)
        return None
    output = None if stdout_read is None else os.fdopen(stdout_read, errors="replace")
    return Forked(int(pid), ours, os.fdopen(stdin_write, "w"), output)


def start() -> None:
    """Has the fork server begin to import, where there is none yet: the first child is then there the sooner."""
    global _link, _server
    with _lock:
        if _link is not None or not FORKS or not _all_open():
            return
        _link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            _server = subprocess.Popen(
                python(sys.path, f"from halfpass.run.fork_server import main; main({theirs.fileno()})"),
                env=os.environ | {CHILD: "1"}, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip


def command(path: Sequence[str]) -> list[str]:
    """What starts the `halfpass` command, arguments to follow, where `sys.path` is `path`."""
    return python(path, "from halfpass.commands.cli import main; sys.exit(main())")


def python(path: Sequence[str], code: str) -> list[str]:
    """What runs Python code of this very halfpass; `python -m` would take the current folder's where it has one."""
    return [sys.executable, "-c", f"import sys; sys.path[:] = {list(path)!r}; {code}"]


def _all_open() -> bool:
    """Whether this process began with a standard input, output and errors: else other files have their numbers."""
    return None not in (sys.__stdin__, sys.__stdout__, sys.__stderr__)


# --- in the fork server -----------------------------------------------------------------------------------------------


def main(descriptor: int) -> None:
    """Forks on request until the process that started it, at the socket's other end, is gone."""
    starter = socket.socket(fileno=descriptor)
    # before the environment changes, among which it looks for its place
    setproctitle.setproctitle(f"halfpass fork server of {os.getppid()}")
    gc.disable()  # which would look for garbage in what is imported, again and again
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # nor in the children, each of which would copy all that it looks at
    gc.enable()
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)  # has it woken up
    ready = selectors.DefaultSelector()
    for one in (starter, woken):
        ready.register(one, selectors.EVENT_READ)
    children: dict[int, socket.socket] = {}
    while True:
        for key, _ in ready.select():
            link: Any = key.fileobj
            if link is woken:
                woken.recv(4096)
                _tell_ends(children)
                continue
            message, files, _, _ = socket.recv_fds(link, LARGEST, 4)
            if not message:
                if link is starter:
                    os._exit(0)
                ready.unregister(link)
                link.close()
                continue
            above, below = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                ready.close()
                for other in (starter, woken, wake, above, *children.values()):
                    other.close()
                _become(json.loads(message), files, below)
            below.close()
            ready.register(above, selectors.EVENT_READ)
            children[pid] = socket.socket(fileno=files[0])
            for file in files[1:]:
                os.close(file)
            with suppress(OSError):  # it may be gone already
                children[pid].send(str(pid).encode())


def _tell_ends(children: dict[int, socket.socket]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        link = children.pop(pid)
        with link, suppress(OSError):
            link.send(str(os.waitstatus_to_exitcode(status)).encode())


def _become(request: dict[str, Any], files: Sequence[int], link: socket.socket) -> None:
    """In the forked process: what `python -m halfpass` would be."""
    global _link
    _link = link
    os.setsid()
    os.close(files[0])
    for number, file in enumerate(files[1:]):
        os.dup2(file, number)
        os.close(file)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        errors = "backslashreplace" if name == "stderr" else None
        setattr(sys, name, open(number, mode, buffering=1, errors=errors, closefd=False))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if torch.cuda._is_in_bad_fork():  # something that was imported has looked for GPUs
        os.execve(sys.executable, [*command(request["path"]), *request["arguments"]], os.environ)
    importlib.import_module("halfpass.run.children").find_out_whose()
    sys.path[:], sys.argv = request["path"], ["halfpass", *request["arguments"]]
    random.seed()
    np.random.seed()
    setproctitle.setproctitle(" ".join(sys.argv))
    sys.exit(importlib.import_module("halfpass.commands.cli").main())
