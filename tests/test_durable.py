"""Nothing lost, nothing twice: what either side keeps, and runs that are killed, cut and told to leave."""

import hashlib
import importlib.util
import io
import json
import random
import signal
import time
from pathlib import Path

import commands
import pytest
import torch

from halfpass.commands.cli import main
from halfpass.config import Config
from halfpass.errors import InputError, RunError
from halfpass.run import checkpoint
from halfpass.run.records import RunFolder, refuse_run
from halfpass.wire import outbox as outbox_module
from halfpass.wire.outbox import Outbox

FILE = Path(__file__).parents[1] / "benchmarks" / "chaos.py"
spec = importlib.util.spec_from_file_location("chaos", FILE)
chaos = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chaos)


def started(run, name, words):
    with (run.folder / f"{name}.log").open("ab") as log:
        run.processes[name] = commands.start(words, run.folder, log.fileno(), log.fileno())


chaos.Run._start = started  # forked: a run of this file starts ten processes

# ----------------------------------------------------------------------------------------------------- the outbox


def message(place, size=100):
    return random.Random(place).randbytes(size + place % 7)


def filled(folder, count=20, **options):
    box = Outbox(folder, run="abc", **{"memory_bytes": 500} | options)
    for place in range(1, count + 1):
        assert box.add(message(place)) == place
    return box


def contents(box):
    return {place: box.get(place) for place in range(box.first, box.last + 1)}


def test_an_outbox_gives_back_what_was_put_in_from_memory_and_disk_and_lets_go(tmp_path, monkeypatch):
    monkeypatch.setattr(outbox_module, "SEGMENT_BYTES", 600)
    box = filled(tmp_path / "spool")
    assert contents(box) == {place: message(place) for place in range(1, 21)}
    assert box._held_bytes <= 500 < box.kept_bytes
    box.let_go(9)
    assert contents(box) == {place: message(place) for place in range(10, 21)}
    assert [box.bytes_behind(k) for k in (20, 17, 0)] == [
        sum(len(message(place)) for place in range(first, 21)) for first in (21, 18, 10)
    ]
    box.save()
    assert box._held_bytes == 0
    assert contents(box) == {place: message(place) for place in range(10, 21)}
    assert min(int(file.stem) for file in (tmp_path / "spool").glob("*.spool")) > 1  # whole segments have gone
    box.clear()
    assert not (tmp_path / "spool").exists()
    assert box.add(b"next") == 21


def test_an_outbox_is_loaded_as_it_was_at_a_checkpoint(tmp_path, monkeypatch):
    """What was added behind it is made again; what the other side has durably since may have gone."""
    monkeypatch.setattr(outbox_module, "SEGMENT_BYTES", 600)
    box = filled(tmp_path / "spool")
    box.save()
    for place in range(21, 40):
        box.add(message(place))
    box.let_go(12)
    again = Outbox(tmp_path / "spool", run="abc")
    again.load(20, 3)
    assert again.first <= 13
    assert {p: d for p, d in contents(again).items() if p > 12} == {place: message(place) for place in range(13, 21)}
    assert again.add(message(21)) == 21
    again.save()
    last = Outbox(tmp_path / "spool", run="abc")
    last.load(21, 12)
    assert contents(last) == {place: message(place) for place in range(13, 22)}
    gone = Outbox(tmp_path / "spool", run="abc")
    gone.load(21, 30)  # the other side is further than this one was
    assert (gone.first, gone.last, gone.kept_bytes) == (31, 21, 0)
    assert gone.add(message(22)) == 22
    assert gone.kept_bytes == 0


def test_segments_are_written_over_and_what_an_earlier_one_left_there_is_not_taken_for_the_later_ones(
    tmp_path, monkeypatch
):
    """All messages are of one size, so that old records begin where new ones end."""
    monkeypatch.setattr(outbox_module, "SEGMENT_BYTES", 600)
    box, folder = Outbox(tmp_path / "spool", run="abc", memory_bytes=0), tmp_path / "spool"

    def add(last):
        while box.last < last:
            box.add(message(7 * (box.last + 1)))

    def segments():
        return {file.stat().st_ino for file in folder.iterdir()}

    add(20)
    box.sync()
    first = segments()
    box.let_go(20)
    add(30)
    assert not first & {file.stat().st_ino for file in folder.glob("*.spool")}  # the disk may know the old names
    box.sync()
    before = segments()
    add(37)
    box.sync()
    assert segments() == before  # none is new
    again = Outbox(folder, run="abc")
    again.load(37, 20)
    assert contents(again) == {place: message(7 * place) for place in range(21, 38)}
    assert not list(folder.glob("*.spare"))
    with pytest.raises(InputError, match=r"found none with number 38"):
        Outbox(folder, run="abc").load(38, 20)


def test_a_spool_of_another_run_or_a_damaged_one_is_refused_by_name(tmp_path):
    filled(tmp_path / "spool", memory_bytes=0).save()
    with pytest.raises(InputError, match=r"spool .*\.spool: expected one of run other, found one of another run"):
        Outbox(tmp_path / "spool", run="other").load(20, 0)
    (file,) = (tmp_path / "spool").iterdir()
    whole = file.read_bytes()
    for at in random.Random(0).sample(range(len(whole)), 150):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(InputError, match=r"spool .*: expected (messages 1 to 20|one of run abc)"):
            Outbox(tmp_path / "spool", run="abc").load(20, 0)
        assert file.stat().st_size == len(whole)  # what is refused is left as it is
    file.with_name("000000000021.spool").touch()  # a process that was killed had begun it
    file.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"found none with number 20, or a damaged one; begin the run anew"):
        Outbox(tmp_path / "spool", run="abc").load(20, 0)
    file.write_bytes(whole)
    box = Outbox(tmp_path / "spool", run="abc")
    box.load(20, 0)
    file.write_bytes(whole[:300] + b"x" + whole[301:])  # while it is in use
    with pytest.raises(InputError, match=r"message \d+: expected the bytes that were written, found others"):
        contents(box)


def test_a_spool_that_cannot_be_written_is_said_when_it_is_loaded(tmp_path, monkeypatch):
    filled(tmp_path / "spool", count=4, memory_bytes=0).save()

    def read_only(*arguments):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(outbox_module.os, "truncate", read_only)
    with pytest.raises(InputError, match=r"spool .*: expected a folder that can be read and written, found Read-only file system"):
        Outbox(tmp_path / "spool", run="abc").load(4, 0)


def test_a_run_that_was_broken_off_in_its_first_epoch_is_not_begun_over(tmp_path):
    checkpoint.write(tmp_path / "unfinished.pt", "run", {})
    with pytest.raises(InputError, match=r"expected a folder without a run, found unfinished.pt in .*, or go on with it: halfpass resume"):
        refuse_run(tmp_path)


def test_messages_of_a_segment_are_those_that_its_name_says(tmp_path):
    """A checksum may call sound what belongs somewhere else."""
    filled(tmp_path / "spool", count=4, memory_bytes=0).save()
    (file,) = (tmp_path / "spool").iterdir()
    stray = message(1)
    record = outbox_module._RECORD.pack(1, len(stray), outbox_module._checksum(1, len(stray), stray))
    file.write_bytes(file.read_bytes() + record + stray)
    again = Outbox(tmp_path / "spool", run="abc")
    again.load(4, 0)
    assert contents(again) == {place: message(place) for place in range(1, 5)}
    file.rename(file.with_stem(f"{3:012}"))
    with pytest.raises(InputError, match=r"expected messages 3 to 4, .* found none with number 3"):
        Outbox(tmp_path / "spool", run="abc").load(4, 0)


def test_a_full_disk_is_said_at_a_checkpoint_and_kept_in_memory_meanwhile(tmp_path, monkeypatch):
    box = filled(tmp_path / "spool", count=3)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outbox_module.os, "pwrite", full)
    for place in range(4, 20):
        box.add(message(place))
    assert contents(box) == {place: message(place) for place in range(1, 20)}
    with pytest.raises(RunError, match=r"spool .*: expected room for what the other side may need again, found No space"):
        box.save()
    monkeypatch.undo()
    box.save()
    assert contents(box) == {place: message(place) for place in range(1, 20)}
    assert not Outbox(disk_bytes=100).kept_bytes
    assert not box.has_room(2**32)


def test_rows_of_epochs_wait_for_room_and_no_checkpoint_is_made_before_them(tmp_path, monkeypatch, caplog):
    folder, write, room = RunFolder(tmp_path), outbox_module.os.pwrite, [7]

    def full(descriptor, data, at):
        if room[0] == 0:
            raise OSError(28, "No space left on device")
        data, room[0] = data[: room[0]], room[0] - min(room[0], len(data))
        return write(descriptor, data, at)

    folder.add_rows([{"epoch": 1}])
    monkeypatch.setattr(outbox_module.os, "pwrite", full)
    folder.add_rows([{"epoch": 2}])
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1}\n'  # no part of a row
    assert "not written yet" in caplog.text
    assert "No space left on device" in caplog.text
    for keep in (lambda: folder.save_checkpoint(Config(), 2, {}), lambda: folder.finish({})):
        with pytest.raises(RunError, match=r"metrics.jsonl: expected a file that can be written, found .*No space"):
            keep()
    assert not folder.has_checkpoint
    assert not (tmp_path / "result.json").exists()
    monkeypatch.undo()
    folder.add_rows([{"epoch": 3}])
    assert [row["epoch"] for row in folder.rows(3)] == [1, 2, 3]
    folder.save_checkpoint(Config(), 3, {})


# -------------------------------------------------------------------------------------------------- checkpoints


def state(n):
    return {"weights": {"a": torch.arange(6.0).view(2, 3) + n}, "step": n, "none": None, "list": [(1, "x")]}


def test_a_checkpoint_comes_back_and_a_damaged_one_gives_way_to_the_one_before(tmp_path, caplog):
    file = tmp_path / "unfinished.pt"
    assert not checkpoint.there(file)
    with pytest.raises(InputError, match=r"unfinished.pt: expected the state of a run, found none"):
        checkpoint.read(file)
    checkpoint.write(file, "run", state(1))
    checkpoint.write(file, "run", state(2))
    assert checkpoint.read(file, "run")["step"] == 2
    assert torch.equal(checkpoint.read(file)["weights"]["a"], state(2)["weights"]["a"])
    whole = file.read_bytes()
    for at in random.Random(0).sample(range(len(whole)), 200):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        before = checkpoint.before(file).read_bytes()
        assert checkpoint.read(file, "run")["step"] == 1, at
        checkpoint.before(file).write_bytes(before)
    file.write_bytes(whole[: len(whole) // 2])
    assert checkpoint.read(file, "run")["step"] == 1
    assert "unfinished.pt: expected" in caplog.text
    assert "going on from the one before it" in caplog.text
    assert checkpoint.read(file, "run")["step"] == 1  # it has taken the place of the damaged one
    checkpoint.write(file, "run", state(3))
    assert checkpoint.read(checkpoint.before(file))["step"] == 1  # which a damaged one never does
    with pytest.raises(InputError, match=r"expected the state of run other, found one of run 'run'"):
        checkpoint.read(file, "other")
    checkpoint.remove(file)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_version_is_refused_by_name(tmp_path, monkeypatch):
    file = tmp_path / "unfinished.pt"
    monkeypatch.setattr(checkpoint, "FORMAT", 7)
    checkpoint.write(file, "run", state(1))
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"unfinished.pt: expected format 1, found 7; use the halfpass that wrote it"):
        checkpoint.read(file)
    for size, found in ((0, "an empty file"), (5, "the first 5 bytes of one"), (30, "the first 30 bytes of one")):
        file.write_bytes((checkpoint._MAGIC + b'{"format": 1, "run"')[:size])
        with pytest.raises(InputError, match=rf"expected the state of a run, found {found}; restore it, or train anew"):
            checkpoint.read(file)
    torch.save(state(1), file)
    with pytest.raises(InputError, match=r"expected the state of a run, found another file, or one of an older version"):
        checkpoint.read(file)


def test_what_is_no_state_behind_a_sound_digest_is_refused_by_name(tmp_path):
    """As PyTorch's reader fails at it, in more ways than it says; and a header that Python's would overflow at."""
    file = tmp_path / "unfinished.pt"
    for saved, found in (
        (b"\x80\x02.", r"what PyTorch does not read \(IndexError\)"), (b"", r"what PyTorch does not read \(EOFError\)"), (torch.zeros(2), "Tensor"),
    ):  # fmt: skip
        content = io.BytesIO()
        torch.save(saved, content)
        inner = content.getvalue() if isinstance(saved, torch.Tensor) else saved
        head = b'halfpass checkpoint\n{"format": 1, "run": "run", "bytes": %d}\n' % len(inner)
        file.write_bytes(head + inner + hashlib.blake2b(head + inner).digest())
        with pytest.raises(InputError, match=rf"unfinished.pt: expected the state of a run, found {found}; restore it, or train anew"):
            checkpoint.read(file)
    file.write_bytes(b"halfpass checkpoint\n" + b"[" * 2**17 + b"\n")
    with pytest.raises(InputError, match=r"unfinished.pt: expected a header as it was written, found another"):
        checkpoint.read(file)


# -------------------------------------------------------------------------------------- runs between processes

CASES = {
    "decoupled, splitfed": ("decoupled", 2, ["--clients.rounds", "2", "--server.replay", "2", "--wire.budget", "30000000"]),
    "conventional, relay": ("conventional", 2, ["--clients.topology", "relay"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_whose_processes_are_killed_and_cut_ends_as_one_that_was_not(tmp_path, case):
    """The server leaves once by SIGTERM, and is killed once; a client is killed, another's connection is cut."""
    method, clients, more = CASES[case]
    words = chaos.settings(method, clients, 12, ["--checkpoint.every", "7", "--data.limit", "700", *more])
    with chaos.Run(tmp_path / "plain", words, clients) as plain:
        plain.wait()
    with chaos.Run(tmp_path / "disturbed", words, clients) as run:
        for fault in ("leave", "cut", "client", "server"):
            run.wait_for_progress(time.monotonic() + 60)
            assert not run.ended
            if fault == "leave":
                began = time.monotonic()
                run.processes["server"].send_signal(signal.SIGTERM)
                assert run.processes["server"].wait(10) == 0
                assert time.monotonic() - began < 10
                run._start("server", ["resume", "server"])
            elif fault == "cut":
                run.wires[1].cut()
            else:
                assert run.kill(fault if fault == "server" else "client-0")
        run.wait()
    assert chaos.same(plain.weights(), run.weights())
    assert run.batches() == plain.batches()
    assert set(run.batches().values()) == {1}
    left = {str(file.relative_to(run.folder)) for file in run.folder.rglob("*")}
    assert not [name for name in left if "unfinished" in name or "spool" in name or "outbox" in name]
    said = (run.folder / "server.log").read_text()
    assert "left, as it was told to; go on with halfpass resume" in said
    assert "client 0 is back" in said
    assert "reached the server at" in (run.folder / "client-1.log").read_text()
    assert "internal error" not in "".join(file.read_text() for file in run.folder.glob("*.log"))


def test_all_processes_of_one_machine_are_gone_on_with(tmp_path, monkeypatch, capsys):
    """A chain of client, edge and server that is broken off in the midst of an epoch."""
    monkeypatch.chdir(tmp_path)
    words = [
        "--runtime", "processes", "--clients.count", "2", "--model.cut", "block_1", "--model.edge_cut", "block_3",
        "--train.epochs", "3", "--train.batch_size", "32", "--data.limit", "640", "--train.threads", "1",
        "--checkpoint.every", "3",
    ]  # fmt: skip
    assert main(["train", *words, "--out", "whole"]) == 0
    with (tmp_path / "log").open("wb") as log:
        process = commands.start(["train", *words, "--out", "broken"], ".", log.fileno(), log.fileno())
        ledger = tmp_path / "broken" / "edge" / "ledger.csv"
        deadline = time.monotonic() + 100
        while not (ledger.is_file() and ledger.read_text().count("\n") > 28) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert not (tmp_path / "broken" / "result.json").exists()
    assert main(["train", *words, "--out", "broken"]) == 2
    assert "go on with it: halfpass resume broken" in capsys.readouterr().err
    deadline = time.monotonic() + 20
    while (status := main(["resume", "broken"])) == 2 and time.monotonic() < deadline:  # its children end by themselves
        time.sleep(0.5)
    assert status == 0, capsys.readouterr().err
    files = sorted(file.relative_to("whole") for file in Path("whole").rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        one, other = (chaos.load_file(Path(run) / file) for run in ("whole", "broken"))
        assert all(torch.equal(one[name], other[name]) for name in one), file
    for part in ("", "edge"):
        lines = [(Path(run) / part / "ledger.csv").read_text() for run in ("whole", "broken")]
        assert lines[0] == lines[1]


# -------------------------------------------------------------------------------------------------- with a quorum


def until(holds):
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_with_a_quorum_a_run_goes_on_without_a_client_and_lets_it_back_in(tmp_path):
    """It is killed, given up and gone on with; the server stands still while it starts, so that the run lasts."""
    words = chaos.settings("decoupled", 3, 30, ["--clients.quorum", "2", "--data.limit", "960", "--clients.topology", "relay"])
    with chaos.Run(tmp_path / "run", words, 3) as run:
        until(lambda: run.learned() and any(line.startswith("2,") for line in run.batches()))
        run.processes["client-2"].kill()
        run.processes["client-2"].wait()
        until(lambda: "going on without client 2" in (run.folder / "server.log").read_text())
        run.processes["server"].send_signal(signal.SIGSTOP)
        assert not run.ended
        connections = len(run.wires[2]._open)
        run._start("client-2", ["resume", "site-2"])
        until(lambda: len(run.wires[2]._open) > connections)
        run.processes["server"].send_signal(signal.SIGCONT)
        run.wait()
    result = json.loads((run.folder / "server" / "result.json").read_text())
    (absent,) = (entry for entry in result["absent"] if entry["why"] == "it was away for more than 3 s")
    assert absent["client"] == 2
    first, last = absent["from"], absent["to"]
    assert 1 <= first["epoch"] <= last["epoch"] < 30
    batches = run.batches()
    assert set(batches.values()) == {1}  # of client 2 some are missing, and none is there twice
    epochs = {int(line.split(",")[1]) for line in batches if line.startswith("2,")}
    assert set(range(first["epoch"] + 1, last["epoch"])).isdisjoint(epochs)
    assert 30 in epochs
    assert "the run goes on without this client" in (run.folder / "client-2.log").read_text()
    weights = run.weights()
    assert all(torch.equal(weights["client-0"][n], weights["client-2"][n]) for n in weights["client-0"])  # it is back


def test_with_a_quorum_a_client_may_leave_for_good_and_fewer_are_too_few(tmp_path):
    words = chaos.settings("conventional", 2, 12, ["--wire.timeout", "1.5", "--wire.reconnect", "3", "--clients.quorum", "1"])
    with chaos.Run(tmp_path / "left", words, 2) as run:
        run.wait_for_progress(time.monotonic() + 60)
        run.processes["client-1"].send_signal(signal.SIGTERM)
        run.wait()
    result = json.loads((run.folder / "server" / "result.json").read_text())
    absent = result["absent"][-1]
    assert (absent["client"], absent["to"]) == (1, None)
    assert result["test_accuracy"] > 0.3


def test_a_quorum_of_more_than_all_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "--clients.count", "2", "--clients.quorum", "3", "--out", "run"]) == 2
    assert capsys.readouterr().err == "halfpass: clients.quorum: expected at most clients.count 2, found 3; lower it\n"
    assert not list(tmp_path.iterdir())


def test_a_ledger_that_cannot_be_written_is_written_later(tmp_path, monkeypatch, caplog):
    folder = RunFolder(tmp_path)
    folder.note(0, 0, 0, 32)
    size = folder.ledger_bytes()
    folder.note(1, 0, 0, 16)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(RunError, match=r"ledger.csv: expected a file that can be written, found .*No space left"):
            folder.ledger_bytes()
    folder.note(0, 0, 1, 32)
    folder.ledger_bytes()
    assert (tmp_path / "ledger.csv").read_text() == "client,epoch,step,samples\n0,1,0,32\n1,1,0,16\n0,1,1,32\n"
    folder.cut_ledger(size)
    folder.note(2, 4, 5, 6)
    folder.ledger_bytes()
    assert (tmp_path / "ledger.csv").read_text() == "client,epoch,step,samples\n0,1,0,32\n2,5,5,6\n"
    folder.cut_ledger(999)
    assert "ledger.csv has lost lines: 43 of its 999 bytes are there" in caplog.text
