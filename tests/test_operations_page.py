"""The pages for operators say what the code does: every limit, and what is said of each fault."""

import re
from pathlib import Path

from halfpass import bounded, config
from halfpass.run import admission, checkpoint, children, overview, records, server_process
from halfpass.wire import asking, connection, front, hub, messages, outbox, service, store, trust

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("how-to/two-machines", "how-to/several-devices", "how-to/some-clients-away", "how-to/monitor", "reference/faults", "reference/limits")
PAGE = "\n".join((DOCS / f"{page}.md").read_text() for page in PAGES)
CODE = Path(config.__file__).parent


def rows(first):
    """Cells of the table whose head begins with that."""
    (found,) = re.findall(rf"^\| {re.escape(first)} .*\n\| -.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found.splitlines()]


def of(count):
    """A size in words."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            assert count % unit == 0
            return f"{count // unit} {name}"
    return f"{count}"


def test_limits():
    wire, kept = config.WireConfig(), config.CheckpointConfig()
    leave = children.LEAVE_SECONDS + 2 * service.STOP_SECONDS
    each = f"{front.WAITING}, and {front.WAITING_EACH} from one address, for {front.WAITING_SECONDS:g} s each"
    assert dict(rows("what | limit")) == {
        "a message": f"`wire.window` + {of(service.OVERHEAD_BYTES)}",
        "sent and not acknowledged; waiting at the server, of each client": f"`wire.window`: {of(wire.window)}",
        "parts of a message: tensors and fields, theirs too": f"{messages.MOST_PARTS:,}",
        "dimensions of a tensor": f"{messages.MOST_DIMENSIONS}",
        "what a `+zstd` tensor expands to": "what its shape needs, before any memory is taken",  # tests/test_codec.py
        "weights handed over": "the network's names, shapes and dtypes, finite; in one message",  # tests/test_bounds.py
        "values of a sample's inputs, and of its targets": f"{admission.MOST_VALUES:,}",
        "classes or other outputs": f"{admission.MOST_CLASSES:,}",
        "clients": f"{trust.MOST_CLIENTS:,}",
        "streams": f"1 of each client that has joined; {hub.MOST_STREAMS} calls of one connection",
        "calls that have not joined, and questions": f"{hub.MOST_CALLS} at once of one client, or of one connection without TLS; "
        f"in all {hub.MORE_STREAMS} more than there are clients",
        "threads for streams and calls": f"2 for each client, and {2 * hub.MORE_STREAMS}",
        "new streams of one client, with TLS": f"{hub.STREAMS_AT_ONCE} at first, and {hub.STREAMS_A_SECOND:g} a second",
        "connections of one client that has joined, with TLS": "1",  # tests/test_bounds.py
        "time for a TLS handshake": f"{front.HANDSHAKE_SECONDS:g} s",
        "connections of whom it is not known who they are, with TLS": each,
        "what such a connection may send, and call": f"{of(front.WAITING_BYTES)}, and {front.WAITING_CALLS} times",
        "connections that show neither certificate nor token, with TLS": f"{front.STRANGERS_AT_ONCE} at first and "
        f"{front.STRANGERS_A_SECOND:g} a second, and {front.EACH_AT_ONCE} and {front.EACH_A_SECOND:g} from one address",
        "time to say Join in a stream, or to ask in a call": f"{hub.JOIN_SECONDS:g} s",
        "Join": f"{of(hub.MOST_JOIN_BYTES)}; each JSON text in it {of(admission.MOST_SETTINGS_BYTES)}",
        "time until all clients have joined, or a quorum": f"{server_process.JOIN_SECONDS:g} s",
        "time to reach a server at the start": f"{connection.CONNECT_SECONDS:g} s",
        "silence of a peer": f"`wire.timeout`: {wire.timeout:g} s",
        "a lost peer is waited for": f"`wire.reconnect`: {wire.reconnect:g} s",
        "pause between two attempts": f"{connection.LONGEST_PAUSE:g} s",
        "messages of a client that cannot be used": f"{hub.MOST_REJECTED}, then it is dropped",
        "messages that have come before": "once on each stream, where they are not durable; others cannot be used",
        "signs of life of a client":
            f"{hub.SIGNS_AT_ONCE} at once, and {hub.SIGNS_A_SECOND:g} a second, or two in each quarter of `wire.timeout`",
        "times that a client is dropped": f"{hub.MOST_DROPPED}, then it is refused until the server is started again",
        "another process of a connected client":
            "is let in once the old one is silent for half of `wire.timeout`, at most 10 s",
        "a client's incoming queue": f"{connection.MOST_INCOMING} messages",
        "batches of a client not encoded yet": f"{connection.AHEAD_BATCHES}",
        "steps between checkpoints": f"`checkpoint.every`: {kept.every}",
        "a client's spool": f"`checkpoint.spool`: {of(kept.spool)}",
        "a segment of a spool": of(outbox.SEGMENT_BYTES),
        "kept in memory before it goes to the spool": "a quarter of `wire.window`",
        "the store of uploads":
            f"`server.store_limit`: {of(config.ServerConfig().store_limit)}, at least {of(store.MINIMUM_BYTES)}",
        "time to leave when told to": f"{leave:g} s",
        "a certificate, key or file of tokens": of(trust.MOST_BYTES),
        "settings and grids in YAML": f"{of(bounded.MOST_YAML_BYTES)}, {bounded.MOST_YAML_VALUES:,} values",
        "JSON files": f"{of(bounded.MOST_JSON_BYTES)}, {bounded.MOST_JSON_GROUPS:,} lists and objects",
        "lists and objects in each other, in JSON and YAML": f"{bounded.MOST_DEPTH}",
        "answers to `halfpass status`": f"{of(asking.MOST_BYTES)}, made anew every {hub.SAME_ANSWER_SECONDS:g} s at most; "
        f"of the first {overview.MOST_CLIENTS:,} clients",
    }  # fmt: skip
    code = (CODE / "wire" / "hub.py").read_text()
    assert "count = 2 * (self._clients + MORE_STREAMS)" in code
    assert "silence = time.monotonic(), 2 * heartbeat_seconds(self._timeout)" in code
    assert [2 * service.heartbeat_seconds(timeout) for timeout in (8, 20, 60)] == [4, 10, 10]
    for process in ("client", "server"):
        assert "memory_bytes=config.wire.window // 4" in (CODE / "run" / f"{process}_process.py").read_text()


def test_the_settings_that_the_page_names_are_there():
    known = config.flatten(config.as_dict(config.Config()))
    groups = "|".join({name.partition(".")[0] for name in known if "." in name})
    named = set(re.findall(rf"`(?:--)?((?:{groups})\.[a-z_]+)[`: ]", PAGE))
    files = {name for name in named if name.endswith((".pem", ".py", ".json", ".csv", ".safetensors"))}
    assert len(named) > 15
    assert named - files - {"metrics.jsonl"} <= known.keys()


def test_each_message_of_a_fault_has_words_of_the_code():
    """The beginnings of what the table quotes, as far as they are not names and numbers of one run."""
    code = " ".join(" ".join(file.read_text() for file in sorted(CODE.rglob("*.py"))).split())
    for said in (
        "trying to reach it again for", "again, after", "left, as it was told to; go on with halfpass resume",
        "a stream that ended without it", "going on without client", "which takes part from its next turn on",
        "a run that goes on", "one that ends", "is back", "begins anew: its stream was lost",
        "a message or a sign of life within", "no checkpoint: ", "going on from the one before it",
        "the bytes that were written", "others, by their digest", "which the run may need again", "with which it began",
        "a folder without a run", "a number that is free", "one that has joined already", "it showed no certificate",
        "one of another authority", "a certificate that is valid now", "took the renewed certificate",
        "kept the old certificate", "a token that the server knows", "one that wants TLS, or no halfpass server",
        "it does not speak TLS", "a loopback host", "it has not said who it is", "too many have not said who they are",
        "use the halfpass that wrote it", "one of an older version", "dropped client", "left", "another process",
        "the one that was dropped", "calls at once that have not joined",
    ):  # fmt: skip
        assert said in code, said
        assert said in " ".join(PAGE.split()), said
    assert f"expected protocol {messages.PROTOCOL} (the server's)" in " ".join(PAGE.split())


def test_files_have_the_names_that_the_page_gives():
    names = records.CHECKPOINT, records.LEDGER, records.SERVED, records.JOINED
    assert all(name in PAGE for name in names)
    assert checkpoint.before(Path(records.CHECKPOINT)).name == "unfinished.pt.1"
