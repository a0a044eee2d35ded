"""Trackers follow what is written into a run folder: `--track tensorboard`, or an object of a user's own.

A tracker has three methods: `start(config)` gets the settings by dotted names, `log(row)` each row of `metrics.jsonl`,
and `finish(result)` what `result.json` holds, or None where the run was broken off. Each tracker works on a thread of
its own: one that fails or hangs is said once, and the training goes on. `track.json` in the run folder says how far
each one is, so that a run which is gone on with has no row twice. Tests: tests/test_tracking.py.
"""

import contextlib
import importlib.util
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from halfpass.config import Config, as_dict, flatten
from halfpass.errors import HalfpassError, InputError, choice_error, reason
from halfpass.files import read_mapping, write_json
from halfpass.plugin import call_plugin, find_plugin
from halfpass.run import logs

START_SECONDS = 120.0  # for a library to be imported, from a cold disk, and ready; it is no part of the run
FINISH_SECONDS = 60.0  # for what still waits to be written at the end
LEAVE_SECONDS = 1.5  # where the run was broken off: whoever stops it does not wait long
STATE = "track.json"  # in a run folder: by tracker, its name for the run, and the last epoch that it has
METHODS = ("start", "log", "finish")


class Tracker(Protocol):
    """What is called, in this order, each on the tracker's thread."""

    def start(self, config: Mapping[str, Any]) -> None: ...
    def log(self, row: Mapping[str, Any]) -> None: ...
    def finish(self, result: Mapping[str, Any] | None) -> None: ...


@dataclass
class Place:
    """Where a tracker of `trackers.py` puts a run."""

    run: Path  # the run folder
    folder: Path  # for what it writes: the run folder, or one that several runs share
    group: str | None  # what the runs are called that share it
    known: str | None = None  # what it calls this run; None before it has said so
    epoch: int = 0  # up to which it has the rows

    @property
    def name(self) -> str:
        """Of the run: its folder's, below the folder that runs share."""
        run = self.run.resolve()
        inside = self.group is not None and run.is_relative_to(self.folder.resolve())
        return str(run.relative_to(self.folder.resolve())) if inside else run.name


def names(config: Config) -> list[str]:
    """The trackers of a run."""
    said = (config.track.to or "").split(",")
    return list(dict.fromkeys(name.strip() for name in said if name.strip()))


def check(config: Config) -> None:
    """Raises InputError where a tracker is not known, not installed, or none."""
    from halfpass.run.trackers import TRACKERS

    for name in names(config):
        if ":" in name:
            made = find_plugin("track.to", name)
            missing = [m for m in METHODS if isinstance(made, type) and not callable(getattr(made, m, None))]
            _refuse_missing(name, missing)
        elif name not in TRACKERS:
            raise choice_error("track.to", [*TRACKERS, "module:function"], name)
        elif importlib.util.find_spec(name) is None:
            remedy = f"pip install 'halfpass[{name}]', or pip install {name}"
            raise InputError("track.to", f"{name}, which is a library of its own", "it is not installed", remedy)


def _refuse_missing(name: str, missing: Sequence[str]) -> None:
    if missing:
        expected, found = f"{name} to make an object with {', '.join(METHODS)}", f"no {' and no '.join(missing)}"
        raise InputError("track.to", expected, found, "write the method, even if it does nothing")


def _make(name: str, place: Place) -> Tracker:
    if ":" not in name:
        from halfpass.run.trackers import TRACKERS

        return TRACKERS[name](place)
    made: Any = call_plugin("track.to", name)
    _refuse_missing(name, [method for method in METHODS if not callable(getattr(made, method, None))])
    return made  # type: ignore[no-any-return]


class _Worker(threading.Thread):
    """One tracker at work."""

    def __init__(self, name: str, place: Place, keep: Callable[[], None]) -> None:
        super().__init__(name=f"tracker {name}", daemon=True)  # one that hangs does not keep the process from its end
        self.tracker_name, self.place, self._keep = name, place, keep
        self._work: queue.SimpleQueue[tuple[Callable[[Tracker], None], threading.Event]] = queue.SimpleQueue()
        self.over = threading.Event()
        self.start()

    def do(self, work: Callable[[Tracker], None]) -> threading.Event:
        """The event is set once it is done, or the tracker has failed."""
        done = threading.Event()
        self._work.put((work, done))
        if self.over.is_set():
            done.set()
        return done

    def log(self, epoch: int, rows: Sequence[Mapping[str, Any]]) -> None:
        def work(tracker: Tracker) -> None:
            for row in rows:
                tracker.log(row)
            self.place.epoch = epoch
            self._keep()

        self.do(work)

    def run(self) -> None:
        done = threading.Event()
        try:
            tracker = _make(self.tracker_name, self.place)
            while not self.over.is_set():
                work, done = self._work.get()
                work(tracker)
                done.set()
        except BaseException as error:  # whatever it raises: a training is not lost for it
            said = str(error) if isinstance(error, HalfpassError) else reason(error)
            self.give_up(f"{said}; the run goes on without it")
        finally:
            self.over.set()
            done.set()
            with contextlib.suppress(queue.Empty):
                while True:
                    self._work.get_nowait()[1].set()

    def give_up(self, why: str) -> None:
        """Says so, once."""
        if not self.over.is_set():
            self.over.set()
            logs.say(f"tracker {self.tracker_name}: {why}", logging.WARNING, event="tracker")


class Tracks:
    """All trackers of one run folder."""

    def __init__(self, config: Config, run: Path) -> None:
        """Starts them. What an earlier process has noted of them is taken up."""
        self._run, self._lock = run, threading.Lock()
        folder = Path(config.track.folder or run)
        group = None if config.track.folder is None else folder.resolve().name
        noted = _read_state(run) if names(config) else {}
        self._workers = [
            _Worker(name, Place(run, folder, group, *noted.get(name, (None, 0))), self._keep) for name in names(config)
        ]
        self._finished, settings = False, flatten(as_dict(config))
        started = [worker.do(lambda tracker: tracker.start(settings)) for worker in self._workers]
        self._wait(started, START_SECONDS, "to be ready")
        if not all(worker.over.is_set() for worker in self._workers):
            self._keep()

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of `metrics.jsonl`; those of epochs that a tracker has already are left out."""
        for epoch in sorted({row["epoch"] for row in rows}):
            of_epoch = [dict(row) for row in rows if row["epoch"] == epoch]
            for worker in self._workers:
                if epoch > worker.place.epoch:
                    worker.log(epoch, of_epoch)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """What waits is written; the trackers end. Once."""
        if self._finished:
            return
        self._finished = True
        done = [worker.do(lambda tracker: tracker.finish(result)) for worker in self._workers]
        self._wait(done, LEAVE_SECONDS if result is None else FINISH_SECONDS, "to have written all")
        for worker in self._workers:
            worker.over.set()

    def _wait(self, done: Sequence[threading.Event], seconds: float, what: str) -> None:
        """For each worker's, all at once."""
        deadline = time.monotonic() + seconds
        for worker, event in zip(self._workers, done, strict=True):
            if not event.wait(max(0.0, deadline - time.monotonic())):
                worker.give_up(f"expected it {what} within {seconds:g} s, found it at work; the run goes on without it")

    def _keep(self) -> None:
        with self._lock:
            known = {w.tracker_name: {"run": w.place.known, "epoch": w.place.epoch} for w in self._workers}
            write_json(self._run / STATE, known)


def _read_state(run: Path) -> dict[str, tuple[str | None, int]]:
    """By tracker: what it calls the run, and the last epoch that it has."""
    if not (run / STATE).is_file():
        return {}
    known = read_mapping(run / STATE)[1]
    try:
        return {name: (said["run"] and str(said["run"]), int(said["epoch"])) for name, said in known.items()}
    except (KeyError, TypeError, ValueError):
        raise InputError(
            str(run / STATE), "'run' and 'epoch' of each tracker", json.dumps(known)[:80],
            "restore the file, or remove it: the run is tracked anew then",
        ) from None  # fmt: skip


def measures(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers by the names that charts have: `server/loss`, `client-0/aux_test/accuracy`."""
    found = flatten({k: v for k, v in row.items() if k != "epoch" and not k.endswith("_accuracy")})
    return {f"{row['process']}/{name}": float(value) for name, value in _numbers(found).items()}


def outcome(result: Mapping[str, Any]) -> dict[str, float]:
    """A result's numbers: `test/accuracy`, `bytes/up/activations`."""
    return {name: float(value) for name, value in _numbers(flatten(result)).items()}


def _numbers(flat: Mapping[str, Any]) -> dict[str, float]:
    return {
        name.replace(".", "/"): value for name, value in flat.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }  # fmt: skip
