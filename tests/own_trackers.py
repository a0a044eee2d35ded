"""Trackers of a user's own, for tests/test_tracking.py."""

import json
import time
from pathlib import Path


class Notes:
    """Writes down what it is told, a line for each, into `notes.jsonl` of the run folder."""

    def start(self, config):
        self.file = Path(config["out"]) / "notes.jsonl"
        self._note("start", config)

    def log(self, row):
        self._note("log", row)

    def finish(self, result):
        self._note("finish", result)

    def _note(self, what, value):
        with self.file.open("a") as file:
            file.write(json.dumps([what, value]) + "\n")


class FullDisk(Notes):
    """Its disk is full from the second epoch on."""

    def log(self, row):
        if row["epoch"] == 2:
            Path("/dev/full").write_text("x")
        super().log(row)


class Hangs(Notes):
    def log(self, row):
        time.sleep(60)


class Leaves(Notes):
    def start(self, config):
        raise SystemExit("no account")


class NoFinish:
    def start(self, config): ...

    def log(self, row): ...


def no_finish():
    return NoFinish()


def not_ready():
    raise ConnectionError("nobody there")
