"""What one sees of a run between processes: the table of the server and of `halfpass status --watch`, a site's own line."""

import io

import pytest
from rich.console import Console

from halfpass.commands.status import watch
from halfpass.config import Config
from halfpass.errors import InputError
from halfpass.run import site
from halfpass.run.live import LiveTable, bytes_said
from halfpass.run.overview import Overview, Pace, Position
from halfpass.run.site import SiteLine
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.connection import Look as client_look
from halfpass.wire.hub import Look


def reply(clients=2, **said):
    made = pb.StatusReply(phase="training", epoch=3, epochs=30, step=100, steps=126, clients_count=clients, connected=clients, **said)
    for k in range(clients):
        made.clients.append(pb.ClientStatus(
            client=k, state="connected", step=50, steps=63, samples=400, bytes_up=12_345_678, bytes_down=4000, received=60, applied=57,
        ))  # fmt: skip
    return made


def later(before, **said):
    made = pb.StatusReply()
    made.CopyFrom(before)
    for name, value in said.items():
        setattr(made, name, value)
    return made


def drawn(table, columns, lines=30):
    console = Console(width=columns, file=io.StringIO())
    console.print(table.table(columns, lines))
    return console.file.getvalue()


@pytest.fixture
def table():
    first = reply()
    second = later(first, busy_seconds=2.0, waiting_seconds=4.0, seconds_left=400.0)
    second.waits_for.append(1)
    second.clients[0].samples, second.clients[0].bytes_up = 5200, 22_345_678
    second.clients[1].waits = "server"
    made = LiveTable(lambda: second)
    made.add(0.0, first)
    made.add(4.0, second)
    return made


def test_speeds_are_of_two_looks_and_waits_are_counted(table):
    said = drawn(table, 140)
    assert "training: epoch 3 of 30, about 7 min left" in said
    rows = {line[:9].strip(): line.split() for line in said.splitlines()}
    assert rows["client 0"][2:] == ["connected", "50/63", "1,200", "2.5", "MB", "22.3", "MB", "4", "kB", "3"]
    assert rows["server"][1:] == ["busy", "50%", "100/126", "1,200", "2.5", "MB", "34.7", "MB", "8", "kB", "6", "client", "1,", "4", "s"]
    assert "server, " not in said  # it has waited for no second that has been seen
    table.add(7.0, table._looks[-1][1])
    assert "server, 3 s" in drawn(table, 140)


@pytest.mark.parametrize(("columns", "names"), [
    (30, ["process", "step", "lag"]),
    (40, ["process", "step", "lag"]),
    (60, ["process", "step", "samples/s", "lag", "waits"]),
    (80, ["process", "step", "samples/s", "bytes/s", "total", "lag", "waits"]),
    (140, ["process", "state", "step", "samples/s", "bytes/s", "total", "down", "lag", "waits"]),
])  # fmt: skip
def test_narrow_terminals_leave_columns_out_and_cut_no_number(table, columns, names):
    said = drawn(table, columns)
    head = next(line for line in said.splitlines() if "process" in line).replace("waits for", "waits").split()
    assert head == names
    assert all(len(line) <= columns for line in said.splitlines())
    assert "100/126" in said
    assert "…" not in said
    assert ("34.7 MB" in said) == (columns >= 80)


def test_of_many_clients_those_that_hold_the_run_up():
    many = reply(500)
    many.clients[321].state = "away"
    many.clients[321].away_seconds = 12.4
    made = LiveTable(lambda: many)
    made(80, 20)
    said = drawn(made, 80, 20)
    assert len(said.splitlines()) <= 20
    assert "client 321" in said
    assert "away for 12 s" in said
    assert "487 more" in said


def test_what_a_server_says_is_shown_as_it_is():
    hostile = pb.StatusReply(phase="[/no]\x1b[2J", clients_count=1, epoch=1, clients=[pb.ClientStatus(state="[/no]\x1b[2J", waits="\x1b[2J", away_seconds=float("inf"))])
    made = LiveTable(lambda: hostile)
    made.add(0.0, hostile)
    made.add(5.0, hostile)
    assert "\x1b" not in drawn(made, 140)
    assert "[/no]" in drawn(made, 140)


def test_before_all_have_joined():
    made = LiveTable(lambda: pb.StatusReply(phase="joining", clients_count=3, connected=2))
    made(80, 20)
    assert "joining: waiting for 1 more client" in drawn(made, 80)


def test_bytes():
    assert [bytes_said(n) for n in (-1, 0, 999, 1000, 123_456, 5.5e6, 2e9)] == ["0 B", "0 B", "999 B", "1 kB", "123 kB", "5.5 MB", "2 GB"]


def test_watching_ends_with_the_server_and_needs_a_terminal(monkeypatch):
    monkeypatch.setattr("halfpass.commands.status.WATCH_SECONDS", 0.01)
    answers = [reply(), reply(), InputError("server address", "a server", "none", "start one")]

    def ask():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=20)
    watch(ask, console)
    assert "client 1" in console.file.getvalue()
    assert console.file.getvalue().endswith("the server answers no more: server address: expected a server, found none; start one\n")
    with pytest.raises(InputError, match="--watch: expected a terminal, where a table can be drawn anew, found none; leave it out, or take --json"):
        watch(ask, Console(file=io.StringIO()))


class FakeRun:
    steps = (10, 10)

    def __init__(self, steps):
        self.pace, self.at = Pace([0, 1]), Position("training", 2, steps, 0.5, None)

    def position(self):
        return self.at


class FakeHub:
    def __init__(self, *looks):
        self.looks = looks

    def look(self):
        return self.looks

    def waiting(self):
        return [1], 3.0


def look(client, received, applied, *, held=False, away=None):
    return Look(client, received, applied, 0, 0, 0, {"activations": 5}, {"other": 1}, 0, 0, away, False, False, 0, 0, held)


@pytest.mark.parametrize(("method", "steps", "first", "second", "waits"), [
    ("decoupled", {0: 3, 1: 3}, look(0, 9, 5), look(1, 3, 3), ["", ""]),
    ("decoupled", {0: 10, 1: 3}, look(0, 9, 9), look(1, 9, 3, held=True), ["clients", "server"]),
    ("decoupled", {0: 10, 1: 10}, look(0, 9, 9), look(1, 9, 9), ["", ""]),
    ("conventional", {0: 3, 1: 3}, look(0, 4, 3), look(1, 3, 3), ["server", ""]),
    ("decoupled", {0: 10, 1: 3}, look(0, 9, 9, away=4.0), look(1, 3, 3), ["", ""]),
])  # fmt: skip
def test_who_waits_for_whom(method, steps, first, second, waits):
    overview = Overview(Config(method=method, clients=Config().clients.__class__(count=2)))
    overview.run, overview.hub = FakeRun(steps), FakeHub(first, second)
    said = overview.status()
    assert [client.waits for client in said.clients] == waits
    assert (list(said.waits_for), said.waiting_seconds) == ([1], 3.0)
    assert [client.bytes_up for client in said.clients] == [5, 5]


def test_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("halfpass.run.overview.time.monotonic", lambda: now[0])
    overview = Overview(Config(clients=Config().clients.__class__(count=2)))
    overview.run = FakeRun({0: 0, 1: 0})
    assert overview.status().seconds_left == 0.0
    now[0] += 30.0
    overview.run.at = Position("training", 2, {0: 10, 1: 10}, 0.5, None)
    epochs = Config().train.epochs
    assert overview.status().seconds_left == pytest.approx(30.0 * (epochs - 2))


class FakeClient:
    steps = 40

    def __init__(self, *at):
        self.at = at

    def progress(self):
        return self.at


class FakeWay:
    waits = None

    def __init__(self, *replies, made=0, applied=0, away=None):
        self.replies, self.seen = list(replies), client_look(made, applied, 0, 0, 0, away)

    def look(self):
        return self.seen

    def ask(self):
        return self.replies.pop(0)


def test_a_site_reads_how_far_it_is_and_for_whom_it_waits(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(site.time, "monotonic", lambda: now[0])
    client, way = FakeClient(0, 0, 0, float("nan")), FakeWay()
    line = SiteLine(client, way, 4, 1)
    assert line.text() == "client 1"
    line.missing = 1
    assert line.text() == "client 1, waiting for 1 more client"
    client.at, way.seen = (1, 20, 320, 0.25), client_look(30, 26, 0, 0, 0, None)
    assert line.text() == "client 1, epoch 1/4, step 20/40, loss 0.2500, 4 sent and not learned from"
    client.at, way.waits, now[0] = (2, 20, 320, 0.2), ("begin", 103.0), 110.0
    assert line.text() == "client 1, epoch 2/4, step 20/40, loss 0.2000, waiting for the server since 7 s, about 25 s left, 4 sent and not learned from"
    way.seen = client_look(30, 30, 0, 0, 1, 12.0)
    assert line.text() == "client 1, epoch 2/4, step 20/40, loss 0.2000, the server is away for 12 s, about 25 s left"


def test_a_site_is_told_for_how_many_it_waits_once_for_each_number(caplog):
    joining = [pb.StatusReply(phase="joining", clients_count=3, connected=n) for n in (1, 1, 2)]
    way = FakeWay(*joining, pb.StatusReply(phase="training", clients_count=3, connected=3))
    line = SiteLine(FakeClient(0, 0, 0, 0.0), way, 4, 1)
    with caplog.at_level("INFO", "halfpass"):
        site._find_who_is_missing(line, line._run, way, lambda seconds: False)
    assert caplog.messages == ["waiting for 2 more clients", "waiting for 1 more client"]
    assert line.missing == 0
