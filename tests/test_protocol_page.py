"""docs/reference/protocol.md says what the code does: its numbers, lists, formulas and examples, each read from the page."""

import contextlib
import hashlib
import json
import math
import queue
import re
import struct
import time
from pathlib import Path

import grpc
import pytest
import torch
import yaml
import zstandard

from halfpass import bounded, config
from halfpass.algorithm.handover import relay_memory
from halfpass.arithmetic.optimizers import learning_rate
from halfpass.errors import InputError
from halfpass.run import admission, network, server_process, setup
from halfpass.tasks.table import TASKS, build_task, classes
from halfpass.tasks.task import Options
from halfpass.wire import front, hub, messages, service, trust
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.codec import CODECS

PAGE = (Path(__file__).parent.parent / "docs" / "reference" / "protocol.md").read_text()
EXAMPLE = Path(__file__).parent.parent / "examples" / "node-client"
EXAMPLE_SETTINGS = config.from_dict(yaml.safe_load((EXAMPLE / "run.yaml").read_text()))
FLAT = " ".join(PAGE.split())


def rows(first, columns):
    """The rows of the table whose head begins with that."""
    found = re.search(rf"^\| {re.escape(first)} .*\n\| -.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    parts = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found[1].splitlines()]
    assert all(len(part) == columns for part in parts)
    return parts


def block_with(word):
    """The words of a block of plain text in which that word is."""
    (found,) = (b for b in re.findall(r"^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) if word in b.split())
    return found.split()


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_number_of_the_protocol_and_the_path():
    assert f"protocol number {messages.PROTOCOL};" in FLAT
    assert f"| `protocol` | {messages.PROTOCOL} |" in PAGE
    assert f"path `/{service.SERVICE}/{service.METHOD}`" in FLAT


def test_limits():
    said = {what: limit for what, limit in rows("what | limit", 2)}
    overhead = f"`wire.window` + {service.OVERHEAD_BYTES}"
    assert said == {
        "TLS handshake": f"{front.HANDSHAKE_SECONDS:g} s",
        "from the connection to an accepted `Join`": f"{front.WAITING_SECONDS:g} s, with TLS",
        "from the stream's begin to `Join`": f"{hub.JOIN_SECONDS:g} s",
        "connections that have not joined, with TLS": f"{front.WAITING}, of one address {front.WAITING_EACH}",
        "until all clients have joined": f"{server_process.JOIN_SECONDS:g} s",
        "`Join`, in bytes": f"{hub.MOST_JOIN_BYTES}",
        "each of `settings`, `inputs`, `targets`, in characters": f"{admission.MOST_SETTINGS_BYTES}",
        "lists and objects in each other, in each": f"{bounded.MOST_DEPTH}",
        "values of one sample's inputs, and of its targets": f"{admission.MOST_VALUES}",
        "`outputs`": f"{admission.MOST_CLASSES}",
        "clients": f"{trust.MOST_CLIENTS}",
        "any message, in bytes": overhead,
        "parts of a message: its fields and theirs": f"{messages.MOST_PARTS}",
        "dimensions of a tensor": f"{messages.MOST_DIMENSIONS}",
        "messages that are rejected": f"{hub.MOST_REJECTED}, then the client is dropped",
        "signs of life": f"{hub.SIGNS_AT_ONCE} at once, {hub.SIGNS_A_SECOND:g} a second; more where `wire.timeout` is below 2 s",
        "times that a client is dropped": f"{hub.MOST_DROPPED}, then it is refused",
        "calls of one client at once that have not joined": f"{hub.MOST_CALLS}",
        "streams of one client, with TLS": f"{hub.STREAMS_AT_ONCE} at first, and {hub.STREAMS_A_SECOND:g} a second",
    }
    assert f"{overhead} bytes" in FLAT
    assert "a quarter of `wire.timeout`, at most 5 s" in FLAT
    assert (service.heartbeat_seconds(8), service.heartbeat_seconds(60)) == (2, 5)
    assert f"`checkpoint.every` says: {config.CheckpointConfig().every} steps" in FLAT
    assert f"from 0 to 10{str(round(math.log10(server_process.LONGEST_EPOCH))).translate(str.maketrans('9', '⁹'))} |" in PAGE


def test_who_a_client_is():
    assert "`urn:halfpass:client:N`" in PAGE
    assert trust.identity_of_client(7) == "urn:halfpass:client:7"
    assert f"`{trust.EDGE}`" in PAGE
    assert [trust.number_of([name]) for name in ("client-3", "client-3.site", "client-1234567", "x.client-3")] == [3, 3, None, None]
    assert trust.Trust(token="TOKEN").metadata() == [("authorization", "Bearer TOKEN")]
    assert "`authorization: Bearer TOKEN`" in PAGE


# --- names ------------------------------------------------------------------------------------------------------------


def test_every_field_and_message_has_its_word():
    known = set(re.findall(r"`(?:[A-Z][A-Za-z]+\.)?(\w+)`", PAGE))
    of_files = {"Upload"}  # the server's, not of the wire
    for name, message in pb.DESCRIPTOR.message_types_by_name.items():
        if name not in of_files:
            kinds = {field.name for oneof in message.oneofs for field in oneof.fields}  # which are messages
            assert {field.name for field in message.fields} - kinds <= known, name
            assert name in known or name in ("Tensor", "Score"), name


def test_what_has_a_place():
    assert "the client's `Batch` (but a test's), `EpochEnd` and `Finished`" in FLAT
    assert "the server's `Begin`, `Take`, `Gradients` and `Finish`" in FLAT
    assert hub.NUMBERED == ("begin", "take", "gradients", "finish")
    assert hub.UNNUMBERED == ("join", "alive", "failed", "test_end")


def test_dtypes():
    assert block_with("complex64") == list(messages.DTYPES)
    floats = re.search(r"Floating point may be (\w+), (\w+) or (\w+)", PAGE).groups()
    assert floats == messages.CROSSING_DTYPES


def test_settings_that_each_process_has_for_itself():
    assert set(block_with("runtime")) == config._PRIVATE | {"server.*", "checkpoint.*", "tls.*", "log.*", "metrics.*"}
    assert set(block_with("data.limit")) == config._OWN
    every = config.flatten(config.as_dict(config.Config()))
    assert all(name in every for name in config._PRIVATE | config._OWN)


def test_the_relays_memory():
    for optimizer in ("sgd", "adamw"):
        settings = config.Config(train=config.TrainConfig(optimizer=optimizer))
        client = setup.build_client(settings, network.build_network(settings, (1, 8, 8), 10), 0)
        names = {name.replace("optimizer.0.", "optimizer.I.") for name in relay_memory(client) if ".0." in name}
    assert names == set(re.findall(r"`(optimizer\.I\.\w+)`", PAGE))


def test_the_metrics_of_classification():
    said = re.search(r"In classification they are (.*?)\. Without", FLAT)[1]
    names = re.findall(r"`(\w+)`", said)
    assert set(names) == set(classes(6).metrics())
    assert set(names) - set(classes(5).metrics()) == {"top_5_accuracy"}
    assert set(names) - set(classes(101).metrics()) == {"auroc_macro"}


@pytest.mark.parametrize("total", [7, 100])
def test_the_schedules(total):
    for step in range(total):
        p, s, n = 0.2, step, total
        t = 0.15 * n - 1
        rising, falling = "p / 25 + (p - p / 25) · s / t", "p + (p / 250000 - p) · (s - t) / (n - 1 - t)"
        assert f"`one-cycle`: {rising} up to s = t = 0.15 n - 1, then {falling}" in FLAT
        formula = (rising if s <= t else falling).replace("·", "*")
        assert learning_rate("one-cycle", p, s, n) == pytest.approx(eval(formula))
        assert learning_rate("cosine", p, s, n) == pytest.approx(p * (1 + math.cos(math.pi * s / n)) / 2)


def test_the_tasks_whose_heads_answer():
    said = re.search(r"the task has probabilities \((.*?)\)", PAGE)[1].split(", ")
    specs = {"segmentation": ("int64", (4, 4)), "tokens": ("int64", (5,)), "classification": ("int64", ())}
    built = {name: build_task(name, 3, {"": specs.get(name, ("float32", (3,)))}, Options()) for name in TASKS}
    assert [name for name, task in built.items() if task.probabilities is not None] == said


# --- joining ----------------------------------------------------------------------------------------------------------


def test_the_fingerprint_of_the_example(monkeypatch):
    monkeypatch.chdir(EXAMPLE)
    text = re.search(r"```text\n(\[.*)\n```", PAGE)[1]
    made = network.build_network(EXAMPLE_SETTINGS, (8, 4, 4), 4)
    state = [(f"server {name}", tuple(value.shape)) for name, value in made.halves.server.state_dict().items()]
    assert repr([*state, made.cut_shapes, 4]) == text
    assert json.loads((EXAMPLE / "join.json").read_text())["fingerprint"] == made.fingerprint
    found = re.search(r"its fingerprint `(\w+)`", FLAT)[1]
    assert found == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_a_fingerprint_of_a_cut_network_is_made_alike():
    """Of digits-cnn, with 1-D shapes, by the page's words."""
    settings = config.Config()
    made = network.build_network(settings, (1, 8, 8), 10)
    parts = []
    for side, half in (("client", made.halves.client), ("server", made.halves.server)):
        parts += [(f"{side} {name}", tuple(value.shape)) for name, value in half.state_dict().items()]
    text = repr([*parts, made.cut_shapes, 10])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == made.fingerprint
    assert made.plans == {"cut": None}  # then Join.plan may be empty
    assert network.read_plans("") == {}


def test_a_join_as_the_page_says_is_taken(monkeypatch):
    """As `halfpass agreement` prints it, and without null settings, data, weights, targets and plan."""
    monkeypatch.chdir(EXAMPLE)
    said = json.loads((EXAMPLE / "join.json").read_text())
    admission.Admission(EXAMPLE_SETTINGS).admit(pb.Join(**said))
    needed = {key: value for key, value in json.loads(said["settings"]).items() if value is not None}
    del needed["data"], needed["weights"]
    join = pb.Join(
        protocol=messages.PROTOCOL, settings=json.dumps(needed), inputs=said["inputs"], outputs=4,
        samples=200, steps=7, parameters=said["parameters"], fingerprint="7e9c24ed30781b57",
    )  # fmt: skip
    admitted = admission.Admission(EXAMPLE_SETTINGS)
    admitted.admit(join)
    assert admitted.network.crossing(test=False) == ([((8, 4, 4), "float32")], [])
    other = pb.Join()
    other.CopyFrom(join)
    other.fingerprint = "0"
    with pytest.raises(ValueError, match="fingerprint"):
        admission.Admission(EXAMPLE_SETTINGS).admit(other)


# --- codecs -----------------------------------------------------------------------------------------------------------

VALUES = json.loads(re.search(r"^(\[\[0, -1\].*)$", PAGE, re.MULTILINE)[1])
BENDS = dict(zip(("int4", "int2"), map(float, re.search(r"by a bend of ([\d.]+) and ([\d.]+)\.", FLAT).groups()), strict=True))


def examples():
    """name → (bytes, decoded)."""
    table = {name.strip("`"): (bytes.fromhex(data.strip("`")), decoded) for name, data, decoded in rows("codec", 3)}
    return {
        name: (data, table[decoded.split("`")[1]][1] if decoded.startswith("as ") else decoded)
        for name, (data, decoded) in table.items()
    }


def by_the_page(codec, data):
    """The plain way: 4 rows of 2 channels, decoded number by number."""
    if codec.endswith("+zstd"):
        assert zstandard.frame_content_size(data) > 0
        return by_the_page(codec.removesuffix("+zstd"), zstandard.ZstdDecompressor().decompress(data))
    if codec == "none":
        return list(struct.unpack("<8f", data))
    if codec == "fp16":
        return list(struct.unpack("<8e", data))
    if codec == "bf16":
        return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, 16, 2)]
    bits, low, step, codes = int(codec.removeprefix("int")), struct.unpack("<2f", data[:8]), struct.unpack("<2f", data[8:16]), data[16:]
    assert len(data) == 2 * (8 + math.ceil(4 * bits / 8))
    share, last, bend, decoded = 8 // bits, 2**bits - 1, BENDS.get(codec, 0), []

    def at(t):
        return t / (1 - bend * abs(t))

    for row in range(4):
        for channel in range(2):
            k = codes[row // share * 2 + channel] >> bits * (row % share) & last
            if low[channel] == 0 or bits == 8:
                decoded.append(low[channel] + step[channel] * at(k))
            else:
                decoded.append(low[channel] + step[channel] * at(last / 2) + step[channel] * at(k - last / 2))
    return decoded


def test_there_is_an_example_of_every_codec():
    assert list(examples()) == list(CODECS)


@pytest.mark.parametrize("name", CODECS)
def test_the_example_is_what_the_codec_gives(name):
    data, decoded = examples()[name]
    rows_of = torch.tensor(VALUES, dtype=torch.float32)
    pictures = rows_of.view(1, 2, 2, 2).movedim(-1, 1)  # (N, C, H, W), stored as (N, H, W, C)
    expected = [float(number) for number in decoded.split(", ")]
    for tensor in (rows_of, pictures):
        made = messages.write_tensor(tensor, name)
        assert made.channels_last == (tensor.ndim == 4)
        if name.endswith("+zstd"):  # what a library makes of it is its own affair
            assert zstandard.ZstdDecompressor().decompress(made.data) == zstandard.ZstdDecompressor().decompress(data)
        else:
            assert made.data == data
        made.data = data
        read = messages.read_tensor(made, "the page")
        stored = (read.movedim(1, -1) if read.ndim == 4 else read).flatten().tolist()
        assert stored == pytest.approx(expected, rel=5e-4)
        assert stored == pytest.approx(by_the_page(name, data), rel=1e-6)


def test_a_frame_that_does_not_say_its_size_is_refused():
    data = zstandard.ZstdCompressor(write_content_size=False).compress(examples()["int8"][0])
    message = messages.write_tensor(torch.tensor(VALUES, dtype=torch.float32), "int8+zstd")
    message.data = data
    with pytest.raises(ValueError, match="expected the values of shape"):
        messages.read_tensor(message, "the page")


def test_codes_of_an_odd_number_of_rows_are_filled_up():
    for name, size in (("int8", 8 + 5), ("int4", 8 + 3), ("int2", 8 + 2)):
        assert len(messages.write_tensor(torch.rand(5), name).data) == size  # of one dimension: one channel
        assert messages.write_tensor(torch.rand(0, 3), name).data == b""


# --- batches ----------------------------------------------------------------------------------------------------------


def batch(**fields):
    made = pb.Batch(**fields)
    made.tensors.append(messages.write_tensor(torch.ones(2, 3)))
    return made


def check(made, **options):
    messages.check_batch(made, 0, [((3,), "float32")], 4, 8, **options)


def test_class_numbers_may_be_targets():
    check(batch(labels=[0, 3]))
    check(batch(targets=[messages.write_tensor(torch.tensor([1, -100]))]))
    with pytest.raises(ValueError, match="labels from 0 to 3, found 4"):
        check(batch(labels=[0, 4]))


def test_labels_that_are_not_packed_are_parts_each():
    many = 70_000
    assert messages.few_parts(pb.ClientMessage(batch=pb.Batch(labels=[1] * many)).SerializeToString())
    inner = b"\x30\x01" * many  # field 6, varint
    length = bytearray()
    rest = len(inner)
    while rest:
        length.append(rest & 127 | (128 if rest > 127 else 0))
        rest >>= 7
    assert not messages.few_parts(b"\x12" + bytes(length) + inner)


def test_the_floats_that_cross_and_exact_codecs_of_others():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made = pb.Batch(labels=[0, 1], tensors=[messages.write_tensor(torch.ones(2, 3, dtype=dtype), "int8")])
        check(made, codec="int8")
    assert re.search(r"another may also have `none` or `none\+zstd`", FLAT)
    assert messages.EXACT == ("none", "none+zstd")


def test_answers_are_halves_of_the_right_shape():
    made = batch(labels=[0, 1], test=True, answers=messages.write_tensor(torch.full((2, 4), 0.25, dtype=torch.float16)))
    check(made, with_answers=True)
    with pytest.raises(ValueError, match="found the head's answers"):
        check(made)


def test_the_fields_of_join_and_batch_are_all_in_their_tables():
    for name, heading in (("Join", "## What to say at joining"), ("Batch", "## Batch"), ("EpochEnd", "## EpochEnd")):
        table = re.search(r"(?:^\|.*\n)+", PAGE.partition(f"\n{heading}\n")[2], re.MULTILINE)[0]
        listed = {field for line in table.splitlines() for field in re.findall(r"`(\w+)`", line.split(" | ")[0])}
        assert listed == {field.name for field in pb.DESCRIPTOR.message_types_by_name[name].fields}


# --- places -----------------------------------------------------------------------------------------------------------


class Raw:
    """A client that says whatever it is told to."""

    def __init__(self, port, **join):
        self.said = queue.Queue()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])
        to, of = pb.ClientMessage.SerializeToString, pb.ServerMessage.FromString
        stream = self.channel.stream_stream("/halfpass.SplitLearning/Session", request_serializer=to, response_deserializer=of)
        self.replies = stream(iter(self.said.get, None), timeout=30)
        self.say(join=pb.Join(**({"first": 1} | join)))

    def say(self, **message):
        self.said.put(pb.ClientMessage(**message))

    def hear(self, kind):
        return next(message for message in self.replies if message.WhichOneof("kind") == kind)

    def leave(self):
        self.said.put(None)
        self.channel.close()


@contextlib.contextmanager
def served():
    def refuse(client, batch):
        if batch.labels[0] == 9:
            raise InputError("batch", "no 9", "9", "send another")

    server = hub.Hub(
        "127.0.0.1:0", clients=1, window_bytes=2**20, timeout=10, admit=lambda join: None, check=refuse, reconnect=30, run="it",
    )  # fmt: skip
    try:
        yield server
    finally:
        server.stop()


def step(number, label=1):
    return batch(step=number, labels=[label] * 2)


def test_places():
    """What came before is ignored; a wrong place is still to come; that of a batch that does not fit is taken."""
    with served() as server:
        client = Raw(server.port)
        assert client.hear("joined").joined == pb.Joined(run="it", received=0)
        client.say(place=2, batch=step(0))
        assert "expected number 1 in its sequence, found 2" in client.hear("rejected").rejected.reason
        client.say(place=1, batch=step(0))
        client.say(place=1, batch=step(5))
        client.say(place=2, batch=step(1, label=9))
        assert "expected no 9" in client.hear("rejected").rejected.reason
        client.say(place=3, batch=step(2))
        steps = []
        for _ in range(2):
            _, received = server.take([0], "batch")
            steps.append((received.place, received.batch.step))
            server.done(0, received)
            server.acknowledge(0)
        assert steps == [(1, 0), (3, 2)]
        assert next(message.applied for message in client.replies if message.applied > 1) == 3
        client.leave()


def test_who_may_go_on_and_who_may_begin_anew():
    with served() as server:
        first = Raw(server.port, process=7)
        first.hear("joined")
        server.send(0, pb.ServerMessage(begin=pb.Begin()))
        first.hear("begin")
        first.say(place=1, batch=step(0))
        server.take([0], "batch")
        second = Raw(server.port, run="it", received=1, process=7)  # takes the place of the first
        assert second.hear("joined").joined.received == 1
        second.leave()
        wait_until(lambda: server.peer(0).stream is None)
        third = Raw(server.port)  # nothing was said to be durable
        assert third.hear("joined").joined.received == 1
        assert third.hear("begin").place == 1
        third.say(alive=pb.Alive(), durable=1)
        wait_until(lambda: server.peer(0).outbox.durable == 1)
        third.leave()
        wait_until(lambda: server.peer(0).stream is None)
        assert "has this server's messages up to 1, found 0" in Raw(server.port).hear("failed").failed.reason
        late = Raw(server.port, run="it", received=1, first=3)
        assert "can send its message 2 again, found from 3" in late.hear("failed").failed.reason
        assert "expected a client of run it, found one of run other" in Raw(server.port, run="other").hear("failed").failed.reason


def wait_until(holds):
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
