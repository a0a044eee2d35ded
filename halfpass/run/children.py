"""Child processes of a command: started, watched and stopped so that none is ever left behind.

A child runs `halfpass …` in a session of its own, so that Ctrl-C reaches the parent alone, which then stops its
children; it is forked where it can be (`fork_server.py`). Its standard input is a pipe that nobody writes to: when the
parent dies, however it dies, the pipe closes and the child stops itself.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import IO

from halfpass.errors import HalfpassError, PassedOnError
from halfpass.run.fork_server import CHILD, Forked, command, fork

IS_CHILD = False
STOP_SECONDS = 2.0
LEAVE_SECONDS = 6.0  # for a step to end and a state to be kept; the rest of ten is for connections
INTERRUPTED = 130  # exit status of an interrupted child, which says nothing itself


_told = threading.Event()


def find_out_whose() -> None:
    """Whether this process is a command's child, as that says in the environment; what this one starts is not."""
    global IS_CHILD
    IS_CHILD = os.environ.pop(CHILD, None) is not None


find_out_whose()


class Child:
    """One child process. `quiet` keeps what it writes to standard error instead of showing it."""

    def __init__(self, name: str, arguments: Sequence[str], *, quiet: bool = False, pipe: bool = False) -> None:
        self.name = name
        self._errors: IO[str] | None = tempfile.TemporaryFile("w+") if quiet else None  # noqa: SIM115
        stdout, errors = subprocess.PIPE if pipe else None, None if self._errors is None else self._errors.fileno()
        forked = fork(arguments, stdout=stdout, stderr=errors)
        self.process: Forked | subprocess.Popen[str] = forked or subprocess.Popen(
            [*command(sys.path), *arguments], stdin=subprocess.PIPE, text=True, stdout=stdout,
            stderr=errors, start_new_session=True, env=os.environ | {CHILD: "1"},
        )  # fmt: skip
        self._first: queue.SimpleQueue[str] = queue.SimpleQueue()
        if pipe:
            threading.Thread(target=self._read_output, daemon=True).start()

    def status(self) -> int | None:
        """Exit status, or None while it runs."""
        return self.process.poll()

    @property
    def killed(self) -> bool:
        """Whether a signal ended it, so that it could tell nobody why."""
        return (self.status() or 0) < 0

    def first_line(self, seconds: float) -> str:
        """The first line that it writes to standard output; empty when it ends first, or after `seconds`."""
        try:
            return self._first.get(timeout=seconds).strip()
        except queue.Empty:
            return ""

    def _read_output(self) -> None:
        """Passes on what a network of the user's prints: a pipe that nobody reads would stop the child when full."""
        output = self.process.stdout
        assert output is not None
        self._first.put(output.readline())
        for line in output:
            with contextlib.suppress(OSError):  # nobody reads this process's either
                sys.stdout.write(line)

    def failure(self) -> PassedOnError:
        """Why it failed, in a line that the user has not read yet."""
        status = self.status() or 0
        if status in (1, 2):  # it has said so itself
            return PassedOnError(self._last_line(), status)
        found = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return PassedOnError(f"{self.name}: expected its orderly end, found {found}; is memory short?", 1)

    def _last_line(self) -> str:
        """What a quiet child said; nothing of one whose words are shown as they come."""
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
        deadline = time.monotonic() + STOP_SECONDS
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
            if child.status() is None:
                child.process.kill()
                child.process.wait()


def be_interruptible() -> None:
    """SIGTERM and SIGHUP end this process as Ctrl-C does: orderly. A child also ends when its parent is gone. Signals
    are the main thread's: in another, this and `leave_when_told` leave them to whoever has that."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if not _in_main_thread():
        return
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # a terminal that was closed; nohup has it ignored
        signal.signal(signal.SIGHUP, interrupt)
    if IS_CHILD:
        threading.Thread(target=_end_with_parent, daemon=True).start()


class Left(BaseException):
    """This process was told to leave: what it has kept is what it can be gone on with, and its peers wait for it.
    `kept`: whether that is so, once the run has begun. `why`: what made it leave, where nobody told it to."""

    def __init__(self, kept: bool = True, why: str = "") -> None:
        super().__init__()
        self.kept, self.why = kept, why


def leave_when_told() -> None:
    """From now on SIGTERM and SIGHUP have this process keep its state where the next step would begin, and leave within
    LEAVE_SECONDS, whatever it does; a second one ends it at once."""

    def told(number: int, frame: FrameType | None) -> None:
        if _told.is_set():
            os._exit(1)
        _told.set()
        signal.setitimer(signal.ITIMER_REAL, LEAVE_SECONDS)

    def out_of_time(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGALRM, lambda *_: os._exit(1))  # what is kept is on the disk
        signal.setitimer(signal.ITIMER_REAL, 3.0)
        raise Left

    if not _in_main_thread():
        return
    _told.clear()
    signal.signal(signal.SIGALRM, out_of_time)
    signal.signal(signal.SIGTERM, told)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, told)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def leaving() -> bool:
    """Whether this process was told to leave."""
    return _told.is_set()


def _end_with_parent() -> None:
    sys.stdin.read()  # returns when the parent's end of the pipe closes
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os._exit(1)


def run_alone(name: str, arguments: Sequence[str]) -> None:
    """Runs one child to its end, what it writes shown; raises PassedOnError with its exit status."""
    child = Child(name, arguments)
    with stopping([child]):
        child.process.wait()
    if child.status() != 0:
        raise child.failure()


def for_peer(who: str, error: BaseException) -> tuple[str, int]:
    """(reason, exit status) for the other side of the wire."""
    if isinstance(error, HalfpassError):
        return str(error), error.exit_status
    return f"{who}: expected it to go on, found {describe(error)}; look at what it printed", 1


def describe(error: BaseException) -> str:
    """One line for the user."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, Left):
        if error.why:
            return f"left: {error.why}{'; go on with halfpass resume' if error.kept else ''}"
        return "left, as it was told to; go on with halfpass resume" if error.kept else "left, as it was told to"
    if isinstance(error, HalfpassError):
        return str(error)
    return f"internal error: {type(error).__name__}: {' '.join(str(error).split())}; --debug shows where"
