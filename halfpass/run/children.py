"""Child processes of a command: started, watched and stopped so that none is ever left behind.

A child runs `python -m halfpass …` in a session of its own, so that Ctrl-C reaches the parent alone, which then stops
its children. Its standard input is a pipe that nobody writes to: when the parent dies, however it dies, the pipe
closes and the child stops itself.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import IO

from halfpass.errors import HalfpassError, RunError

CHILD_VARIABLE = "HALFPASS_CHILD"
STOP_SECONDS = 2.0


class ChildFailedError(RunError):
    """A child stopped with an error; `said` is what it wrote, empty where the user has read it already."""

    def __init__(self, said: str, exit_status: int) -> None:
        Exception.__init__(self, said)
        self.exit_status = exit_status if exit_status in (1, 2) else 1


class Child:
    """One child process. `quiet` keeps what it writes to standard error instead of showing it."""

    def __init__(self, name: str, arguments: Sequence[str], *, quiet: bool = False, pipe: bool = False) -> None:
        self.name = name
        self._errors: IO[str] | None = tempfile.TemporaryFile("w+") if quiet else None  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "halfpass", *arguments], stdin=subprocess.PIPE, text=True,
            stdout=subprocess.PIPE if pipe else None, stderr=self._errors, start_new_session=True,
            env=os.environ | {CHILD_VARIABLE: "1"},
        )  # fmt: skip

    def status(self) -> int | None:
        """Exit status, or None while it runs."""
        return self.process.poll()

    def first_line(self, seconds: float) -> str:
        """The first line it writes to standard output; empty when it ends first, or after `seconds`."""
        lines: list[str] = []
        output = self.process.stdout
        assert output is not None
        reader = threading.Thread(target=lambda: lines.append(output.readline()), daemon=True)
        reader.start()
        reader.join(seconds)
        return lines[0].strip() if lines else ""

    def said(self) -> str:
        """The last line that a quiet child wrote to standard error, without the program's name."""
        if self._errors is None:
            return ""
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1].removeprefix("halfpass: ") if lines else f"{self.name}: stopped without a word"


@contextlib.contextmanager
def stopping(children: list[Child]) -> Iterator[None]:
    """Whatever happens inside, no child runs on afterwards; `children` may grow inside."""
    try:
        yield
    finally:
        for child in children:
            if child.status() is None:
                child.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS + 0.5 * (len(children) == 1)  # one child may have its own to stop
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
            if child.status() is None:
                child.process.kill()
                child.process.wait()


def be_interruptible() -> None:
    """SIGTERM ends this process as Ctrl-C does: orderly. A child also ends when its parent is gone."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    if is_child():
        threading.Thread(target=_end_with_parent, daemon=True).start()


def is_child() -> bool:
    return CHILD_VARIABLE in os.environ


def _end_with_parent() -> None:
    sys.stdin.read()  # returns when the parent's end of the pipe closes
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os._exit(1)


def run_alone(name: str, arguments: Sequence[str]) -> None:
    """Runs one child to its end, what it writes shown; raises ChildFailedError with its exit status."""
    children = [Child(name, arguments)]
    with stopping(children):
        status = children[0].process.wait()
    if status != 0:
        raise ChildFailedError("", status)


def describe(error: BaseException) -> str:
    """One line for the user; empty where there is nothing to say."""
    if isinstance(error, KeyboardInterrupt):
        return "" if is_child() else "interrupted"  # the parent says it
    if isinstance(error, HalfpassError):
        return str(error)
    return f"internal error: {type(error).__name__}: {' '.join(str(error).split())}; --debug shows where"
