"""`halfpass report RUN --live`, asked as a browser would."""

import http.client
import json
import threading
import time
import urllib.error
import urllib.request

import pytest
import yaml

from halfpass.commands import live_report
from halfpass.commands.cli import main
from halfpass.commands.live_report import show_live
from halfpass.config import Config, as_dict
from halfpass.run.train import train

ROW = {"epoch": 1, "process": "server", "loss": 0.5, "metric": "accuracy", "metric_unit": "%", "test": {"accuracy": 0.5}, "busy_seconds": 8.0, "waiting_seconds": 2.0}


class Live:
    """The server of the page, on a thread."""

    def __init__(self, *folders):
        told = threading.Event()
        self.finished = []

        def announce(address):
            self.address = address
            told.set()

        self.thread = threading.Thread(target=lambda: self.finished.append(show_live(lambda: folders, announce)), daemon=True)
        self.thread.start()
        assert told.wait(20)

    def get(self, path="", **headers):
        with urllib.request.urlopen(urllib.request.Request(self.address + path, headers=headers), timeout=5) as answer:
            return answer.read().decode()

    def until(self, found):
        deadline = time.monotonic() + 20
        while not found(state := json.loads(self.get("state"))):
            assert time.monotonic() < deadline, state
            time.sleep(0.02)
        return state


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(live_report, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(live_report, "STAY_SECONDS", 1.5)


def begin(folder, epochs=4):
    folder.mkdir()
    settings = as_dict(Config())
    settings["train"]["epochs"] = epochs
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))


def test_a_page_keeps_up_from_before_the_run_to_its_end(tmp_path):
    folder = tmp_path / "<run>"
    live = Live(folder)
    assert "Waiting for a run in " in live.get()
    begin(folder)
    state = live.until(lambda state: "no epoch is done yet" in state["banner"])
    assert (state["banner"], state["finished"]) == ("<run>: running, epoch 1 of 4, no epoch is done yet", False)
    assert "unfinished" not in live.get()
    (folder / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    state = live.until(lambda other: other["version"] == 3)  # that without a run was the first
    assert "<run>: running, epoch 2 of 4, about 30 s left; the last epoch ended 0 s ago" in state["banner"]
    page = live.get()
    assert "&lt;run&gt;: running, epoch 2 of 4" in page
    assert f"version = {state['version']}" in page
    assert page.rstrip().endswith("</html>")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(ROW | {"epoch": 2})[:40])  # in the middle of a line
    live.until(lambda other: other["version"] > state["version"])
    assert "epoch 2 of 4" in live.get()
    assert not live.finished


def test_it_ends_some_time_after_the_run_has_and_writes_the_report(tmp_path, capsys):
    folder = tmp_path / "run"
    train(Config(
        data=Config().data.__class__(limit=64), train=Config().train.__class__(epochs=1, batch_size=32, threads=1), out=str(folder),
    ))  # fmt: skip
    began = time.monotonic()
    assert main(["report", str(folder), "--live", "--out", str(tmp_path / "late.html")]) == 0
    assert time.monotonic() - began >= 1.5
    said = capsys.readouterr().out
    assert said.startswith("live report: http://127.0.0.1:")
    assert (tmp_path / "late.html").is_file()
    assert "halfpass-live" not in (tmp_path / "late.html").read_text()


def test_a_broken_file_is_said_and_the_page_before_stays(tmp_path):
    folder = tmp_path / "run"
    begin(folder)
    live = Live(folder)
    before = live.get()
    (folder / "metrics.jsonl").write_text(json.dumps(ROW | {"loss": "low"}) + "\n")
    state = live.until(lambda state: "metrics.jsonl" in state["banner"])
    assert "expected a number or null, found 'low'" in state["banner"]
    assert "Results" in before
    assert "Results" in live.get()


def test_only_this_machines_own_names_are_answered(tmp_path):
    live = Live(tmp_path)
    for path, headers, status in (("", {"Host": "evil.example"}, 403), ("etc/passwd", {}, 404)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            live.get(path, **headers)
        assert refused.value.code == status
        refused.value.close()
    assert "Waiting" in live.get()
    address = live.address.removeprefix("http://").strip("/")
    connection = http.client.HTTPConnection(address, timeout=5)
    connection.request("POST", "/")
    assert connection.getresponse().status == 501
    connection.close()
