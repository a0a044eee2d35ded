"""What an operator reads of a server or a client: a line on standard error for each event that matters.

Whoever logs names the event and what is known of it: `LOG.info("client %d joined", 3, extra={"event": "joined",
"client": 3})`. docs/how-to/monitor.md lists the events. Tests: tests/test_operating.py.
"""

import datetime
import json
import logging
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from halfpass.config import LogConfig

LOG = logging.getLogger("halfpass")
EVENTS = "events.jsonl"
SELDOM_SECONDS = 10.0  # from one line to the next of an event that comes often
_USUAL = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}  # what every record has


class JsonLines(logging.Formatter):
    """A JSON object for each record: time, level, event, text, and what is known beside them."""

    def format(self, record: logging.LogRecord) -> str:
        known = {key: _plain(value) for key, value in vars(record).items() if key not in _USUAL}
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": f"{when:%Y-%m-%dT%H:%M:%S}.{when.microsecond // 1000:03}Z", "level": record.levelname.lower(),
            "event": known.pop("event", "other"), "text": record.getMessage(), **known,
        }  # fmt: skip
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _StandardError(logging.StreamHandler[TextIO]):
    """Wherever that is when a line comes: a bar puts itself there, to stay below what is said."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def begin(log: LogConfig, *, quiet: bool = False) -> None:
    """Events go to standard error from now on; a program that logs in its own way keeps that, unless it wants JSON.
    `quiet`: warnings alone, where they are text."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, _StandardError):
            root.removeHandler(handler)
    if log.json or not root.handlers:
        handler = _StandardError()
        handler.setFormatter(JsonLines() if log.json else logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
    if log.json:
        logging.captureWarnings(True)
        threading.excepthook = _of_thread
    LOG.setLevel(logging.WARNING if quiet and not log.json else log.level.upper())


class _InFolder(logging.Handler):
    """Lines of JSON in the run's folder, from when there is a run in it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.setFormatter(JsonLines())
        self._folder, self._lines, self._mode = folder, list[str](), "w"
        self._before = self._run()

    def _run(self) -> tuple[int, int] | None:
        """Which run the folder holds, by the file that is written when one begins."""
        try:
            found = (self._folder / "config.yaml").stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(self.format(record) + "\n")
            if self._run() not in (None, self._before):  # else it is another's
                with (self._folder / EVENTS).open(self._mode) as file:
                    file.writelines(self._lines)
                self._lines, self._mode = [], "a"
        except Exception:  # a full disk, which is said elsewhere, or what cannot be written as JSON
            self.handleError(record)


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """All events are kept in the run folder too, and the error by which the run ended."""
    handler = _InFolder(folder)
    LOG.addHandler(handler)
    try:
        yield
    except BaseException as error:
        known = {"name": LOG.name, "levelno": logging.ERROR, "levelname": "ERROR", "event": "failed"}
        handler.handle(logging.makeLogRecord(known | {"msg": "%s", "args": (str(error) or repr(error),)}))
        raise
    finally:
        LOG.removeHandler(handler)


def in_json() -> bool:
    """Whether all that goes to standard error is JSON."""
    handlers = logging.getLogger().handlers
    return any(isinstance(handler.formatter, JsonLines) for handler in handlers if not isinstance(handler, _InFolder))


def say(line: str, level: int = logging.INFO, *, event: str = "other", traceback: bool = False) -> None:
    """What the user is to know, at once."""
    if in_json():
        LOG.log(level, "%s", line, extra={"event": event}, exc_info=traceback)
    else:
        print(f"halfpass: {line}", file=sys.stderr, flush=True)


def _of_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is not None:
        error = arguments.exc_type, arguments.exc_value, arguments.exc_traceback
        LOG.error("a thread ended: %r", arguments.exc_value, exc_info=error)


class Seldom:
    """The level for an event that comes often: INFO for one in a while, DEBUG for the others."""

    def __init__(self) -> None:
        self._next = 0.0

    def level(self) -> int:
        if (now := time.monotonic()) < self._next:
            return logging.DEBUG
        self._next = now + SELDOM_SECONDS
        return logging.INFO
