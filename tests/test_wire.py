"""The wire: every message's round trip, what is counted, and what a bad message gets."""

import contextlib
import dataclasses
import math
import queue
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import pytest
import torch

from halfpass.cut import CutBatch
from halfpass.errors import InputError, PassedOnError, RunError
from halfpass.wire import connection as connection_end
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire import hub, messages, service
from halfpass.wire.connection import AHEAD_BATCHES, Connection
from halfpass.wire.hub import Hub
from halfpass.wire.loopback import Loopback

SHAPE = (3, 4, 2)  # of the cut, per sample


def batch(client=0, epoch=0, step=0, samples=5, channels_last=False, dtype=torch.float32):
    draws = torch.Generator().manual_seed(step + 1)
    values = (torch.randn(samples, *SHAPE, generator=draws) + 2).to(dtype)
    if channels_last:
        values = values.contiguous(memory_format=torch.channels_last)
    return CutBatch(client, epoch, step, (values,), torch.arange(samples) % 10)


# ---------------------------------------------------------------------------------------------------- messages


def test_targets_of_any_kind_cross_exactly_and_class_numbers_as_ever():
    masks = torch.randint(0, 5, (5, 4, 4))
    targets = {"mask": masks, "of": (torch.rand(5, 2, dtype=torch.float64), torch.tensor([[math.nan]] * 5))}
    message = messages.write_batch(dataclasses.replace(batch(), targets=targets), "int8").batch
    assert not message.labels
    spec = {"mask": ("int64", (4, 4)), "of/#0": ("float64", (2,)), "of/#1": ("float32", (1,))}
    messages.check_batch(message, 0, [(SHAPE, "float32")], 5, 8, targets=spec)
    back = messages.read_batch(message).targets
    assert torch.equal(back["mask"], masks)
    assert torch.equal(back["of"][0], targets["of"][0])
    assert back["of"][1].isnan().all()
    assert not messages.write_batch(batch(), "none").batch.targets
    unlabelled = messages.write_batch(dataclasses.replace(batch(), targets=torch.tensor([1, -100, 2, 0, 1])), "none").batch
    messages.check_batch(unlabelled, 0, [(SHAPE, "float32")], 10, 8)
    assert messages.read_batch(unlabelled).targets.tolist() == [1, -100, 2, 0, 1]
    for change, text in [
        (lambda m: m.targets.pop(), "expected targets .*'of/#1'.*, found"),
        (lambda m: m.targets[0].shape.append(2**31), "expected targets"),
        (lambda m: m.targets[0].__setattr__("codec", "int8"), "expected targets"),
        (lambda m: m.labels.extend([1]), "expected 1 to 8 samples|expected tensors of|expected targets"),
        (lambda m: m.targets.append(m.targets[0]), "expected targets"),
    ]:  # fmt: skip
        bad = pb.Batch()
        bad.CopyFrom(message)
        change(bad)
        with pytest.raises(InputError, match=text):
            messages.check_batch(bad, 0, [(SHAPE, "float32")], 5, 8, targets=spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_come_back_with_values_order_and_memory_of_their_own(dtype, channels_last):
    sent = batch(client=3, epoch=4, step=5, channels_last=channels_last, dtype=dtype)
    data = messages.write_batch(sent, "none", test=True).SerializeToString()
    parsed = pb.ClientMessage.FromString(data)
    received = messages.read_batch(parsed.batch)
    assert parsed.batch.test
    assert (received.client, received.epoch, received.step) == (3, 4, 5)
    assert torch.equal(received.targets, sent.targets)
    assert torch.equal(received.tensors[0], sent.tensors[0])
    assert received.tensors[0].stride() == sent.tensors[0].stride()
    received.tensors[0].zero_()  # writable, and nobody else's
    assert torch.equal(messages.read_batch(parsed.batch).tensors[0], sent.tensors[0])


def test_several_tensors_and_a_view_that_is_not_dense_cross():
    wide = torch.randn(5, 6, 8)[:, ::2, 1:5]
    sent = CutBatch(0, 0, 0, (wide, torch.randn(5, 2)), torch.arange(5))
    received = messages.read_batch(messages.write_batch(sent, "none").batch)
    assert all(torch.equal(a, b) for a, b in zip(sent.tensors, received.tensors, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_volume_has_its_channels_in_dimension_1_too(channels_last):
    """Channels of very different size: with scales of another dimension the small ones would be lost."""
    volume = torch.randn(4, 6, 2, 3, 5) * 10.0 ** torch.arange(-3, 3).view(6, 1, 1, 1)
    order = torch.channels_last_3d if channels_last else torch.contiguous_format
    sent = CutBatch(0, 0, 0, (volume.contiguous(memory_format=order),), torch.arange(4))
    exact = messages.read_batch(messages.write_batch(sent, "none").batch).tensors[0]
    assert torch.equal(exact, volume)
    assert exact.stride() == sent.tensors[0].stride()
    coded = messages.read_batch(messages.write_batch(sent, "int8").batch).tensors[0]
    ranges = volume.amax((0, 2, 3, 4)) - volume.amin((0, 2, 3, 4))
    assert ((coded - volume).abs().amax((0, 2, 3, 4)) <= ranges / 509).all()


def test_weights_and_gradients_round_trip_exactly():
    state = {"half.w": torch.randn(2, 3), "half.count": torch.tensor(7), "half.on": torch.tensor([True, False])}
    read = messages.read_weights(pb.Begin(weights=messages.write_weights(state)).weights)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) and read[name].dtype == state[name].dtype for name in state)
    sent, gradient = batch(), torch.randn(5, *SHAPE)
    message = messages.write_gradients(sent, (gradient,), "none").gradients
    assert torch.equal(messages.read_gradients(message, sent)[0], gradient)
    with pytest.raises(InputError, match="expected the gradients of that batch, found epoch 0, step 0;"):
        messages.read_gradients(message, batch(step=1))


@pytest.mark.parametrize(("change", "text"), [
    (lambda m: m.tensors[0].__setattr__("codec", "gzip"), "expected a codec of none, fp16, bf16, .*, found 'gzip'"),
    (lambda m: m.tensors[0].__setattr__("dtype", "object"), "expected a dtype of float32, .*, found 'object'"),
    (lambda m: m.tensors[0].__setattr__("data", b"123"), "expected the values of shape .*, found 3 bytes"),
    (lambda m: m.tensors[0].__setattr__("data", b"1234" * 7), "expected the values of shape .*, found 28 bytes"),
    (lambda m: m.tensors[0].shape.append(2**31), "expected the values of shape"),
    (lambda m: m.MergeFrom(pb.Batch(tensors=[pb.Tensor(dtype="float32", codec="none", shape=[0, *[2**32 - 1] * 3])])),
     "tensor 1: expected the values of shape"),
    (lambda m: m.tensors[0].ClearField("shape"), r"expected the values of shape \(\), float32, found 480 bytes"),
    (lambda m: m.labels.pop(), "targets: expected those of 5 samples, at least one, found"),
    (lambda m: m.ClearField("labels"), r"targets: expected those of 5 samples, at least one, found \(0,\)"),
    (lambda m: messages.write_tensor(torch.full((3, 10), 0.1), into=m.answers), r"expected \(5, outputs\), found \(3, 10\)"),
    (lambda m: m.ClearField("tensors"), "expected at least one tensor, found none"),
])  # fmt: skip
def test_what_does_not_fit_together_is_refused(change, text):
    message = messages.write_batch(batch(), "none").batch
    change(message)
    with pytest.raises(InputError, match=text):
        messages.read_batch(message)


@pytest.mark.parametrize(("sent", "text"), [
    (batch(client=1), "expected client 0, found client 1"),
    (batch(samples=9), "expected 1 to 8 samples, found 9 of 9"),
    (dataclasses.replace(batch(samples=2), before=3, after=4), "expected 1 to 8 samples, found 2 of 9"),
    (batch(dtype=torch.float64), "expected float32 or bfloat16 or float16, found float64"),
    (CutBatch(0, 0, 0, (torch.zeros(2, 3),), torch.zeros(2, dtype=torch.int64)), r"expected tensors of .* found \[\(2, 3\)"),
    (CutBatch(0, 0, 0, (torch.zeros(1, *SHAPE),), torch.tensor([10])), "expected labels from 0 to 9, found 10"),
])  # fmt: skip
def test_a_batch_must_fit_the_cut(sent, text):
    with pytest.raises(InputError, match=text):
        messages.check_batch(messages.write_batch(sent, "none").batch, 0, [(SHAPE, "float32")], 10, 8)
    messages.check_batch(messages.write_batch(batch(), "none").batch, 0, [(SHAPE, "float32")], 10, 8)


@pytest.mark.parametrize(("change", "text"), [
    (lambda m: m.ClearField("answers"), "expected the head's answers, found no answers"),
    (lambda m: messages.write_tensor(torch.ones(5, 11).half(), into=m.answers), r"expected answers of \(5, 10\) of float16, found \(5, 11\) of float16 in none"),
    (lambda m: messages.write_tensor(torch.ones(5, 10), into=m.answers), "found .* of float32 in none"),
    (lambda m: messages.write_tensor(torch.ones(5, 10).half(), "int8", into=m.answers), "found .* of float16 in int8"),
    (lambda m: messages.write_tensor(torch.full((5, 10), math.nan).half(), into=m.answers), "expected probabilities, from 0 to 1, found values from nan to nan"),
    (lambda m: messages.write_tensor(torch.full((5, 10), 1.2).half(), into=m.answers), "found values from 1.2.* to 1.2"),
    (lambda m: messages.write_tensor(torch.tensor([[-1.0, 2.0] + [0.0] * 8] * 5).half(), into=m.answers), "found values from -1 to 2"),
])  # fmt: skip
def test_answers_must_be_probabilities(change, text):
    """Where they are wanted, and only there."""
    def take(message, wanted):
        messages.check_batch(message, 0, [(SHAPE, "float32")], 10, 8, wanted)
        return messages.read_batch(message)

    good = messages.write_batch(dataclasses.replace(batch(), answers=torch.full((5, 10), 0.1)), "none").batch
    assert torch.equal(take(good, True).answers, torch.full((5, 10), 0.1).half())
    with pytest.raises(InputError, match="expected no answers, found the head's answers"):
        take(good, False)
    bad = pb.Batch()
    bad.CopyFrom(good)
    bad.ClearField("answers")
    change(bad)
    with pytest.raises(InputError, match=text):
        take(bad, True)


def test_what_is_decoded_into_a_used_buffer_is_what_was_sent():
    """And the buffer really is used again, for a batch of its own shape and storage order only."""
    buffers = messages.Buffers()
    first = messages.read_batch(messages.write_batch(batch(channels_last=True), "none").batch, buffers)
    address = first.tensors[0].data_ptr()
    buffers.give_back(first.tensors[0])
    for other in (batch(step=3, samples=4, channels_last=True), batch(step=3)):
        assert messages.read_batch(messages.write_batch(other, "none").batch, buffers).tensors[0].data_ptr() != address
    sent = batch(step=4, channels_last=True)
    again = messages.read_batch(messages.write_batch(sent, "none").batch, buffers)
    assert again.tensors[0].data_ptr() == address
    assert torch.equal(again.tensors[0], sent.tensors[0])
    third = messages.read_batch(messages.write_batch(sent, "none").batch, buffers)
    assert third.tensors[0].data_ptr() != address  # it is in use


@pytest.mark.parametrize("shape", [(5, 6, 1, 1), (5, 1, 4, 3)])
def test_a_buffer_whose_two_storage_orders_are_one_is_used_again(shape):
    buffers = messages.Buffers()
    tensor = torch.rand(shape).contiguous(memory_format=torch.channels_last)
    message = messages.write_batch(CutBatch(0, 0, 0, (tensor,), torch.zeros(5, dtype=torch.int64)), "int8").batch
    first = messages.read_batch(message, buffers).tensors[0]
    buffers.give_back(first)
    assert messages.read_batch(message, buffers).tensors[0].data_ptr() == first.data_ptr()


def test_the_generated_code_is_that_of_the_proto_file(tmp_path):
    from grpc_tools import protoc

    folder = Path(service.__file__).parent
    assert protoc.main(["", f"-I{folder}", f"--python_out={tmp_path}", str(folder / "halfpass.proto")]) == 0
    assert (tmp_path / "halfpass_pb2.py").read_text() == (folder / "halfpass_pb2.py").read_text(), "run make proto"


# ---------------------------------------------------------------------------------------------------- counting


def test_meter_counts_every_byte_of_every_message_once():
    wire = Loopback("none")
    sent = batch(samples=7)
    ups = [
        pb.ClientMessage(join=pb.Join(client=1, settings="{}")),
        messages.write_batch(sent, "none"),
        messages.write_batch(sent, "none", test=True),
        pb.ClientMessage(epoch_end=pb.EpochEnd(weights=messages.write_weights({"half.w": torch.zeros(100)}))),
        pb.ClientMessage(finished=pb.Finished()),
    ]
    downs = [
        messages.write_gradients(sent, sent.tensors, "none"),
        pb.ServerMessage(ack=pb.Ack()),
        pb.ServerMessage(test=pb.Test(epoch=1)),
        pb.ServerMessage(ack=pb.Ack(test=True)),
        pb.ServerMessage(begin=pb.Begin(weights=messages.write_weights({"half.w": torch.zeros(50)}))),
    ]
    for up in ups:
        assert wire.up(up) == up
    for down in downs:
        assert wire.down(down) == down
    meter = wire.meter
    assert meter.up.total() + meter.evaluation_up == sum(len(m.SerializeToString()) for m in ups)
    assert meter.down.total() + meter.evaluation_down == sum(len(m.SerializeToString()) for m in downs)
    values = 7 * 24 * 4
    assert values <= meter.up["activations"] <= values + 40
    assert meter.up["activations"] == meter.down["gradients"]
    assert 400 <= meter.up["weights"] <= 440
    assert 200 <= meter.down["weights"] <= 240
    assert meter.up["labels"] == 7 + 2
    assert meter.evaluation_up == len(ups[2].SerializeToString())
    assert meter.evaluation_down == sum(len(m.SerializeToString()) for m in downs[2:4])


# ------------------------------------------------------------------------------------------------ real connections


class Served:
    """A hub on a free port, with clients on threads of this process."""

    def __init__(self, clients=1, window=2**20, timeout=20.0, admit=lambda join: None):
        self.hub = Hub(
            "127.0.0.1:0", clients=clients, window_bytes=window, timeout=timeout, admit=admit,
            check=lambda client, b: messages.check_batch(b, client, [(SHAPE, "float32")], 10, 2000),
        )  # fmt: skip
        self.address = f"127.0.0.1:{self.hub.port}"

    def connect(self, client=0, window=2**20, timeout=20.0):
        connection = Connection(self.address, window_bytes=window, timeout=timeout)
        connection.send(pb.ClientMessage(join=pb.Join(client=client, settings="{}")))
        connection.receive("joined")
        return connection


@pytest.fixture
def served():
    made = []

    def make(**options):
        made.append(Served(**options))
        return made[-1]

    yield make
    for one in made:
        one.hub.fail("the test is over")
        one.hub.stop()


def take(hub, client, *kinds):
    """Takes a message and works it off."""
    received = hub.take([client], *kinds)[1]
    hub.done(client, received)
    hub.acknowledge(client)
    return received


def numbered(place, message):
    """As bytes, at a place of a client's sequence."""
    message.place = place
    return message.SerializeToString()


def encoded(*batches):
    return [messages.write_batch(sent, "none") for sent in batches]


def test_batches_arrive_whole_and_acknowledgements_open_the_window(served):
    one = served()
    size = messages.write_batch(batch(), "none").ByteSize()
    connection = one.connect(window=2 * size + 10)
    for step in range(2 + AHEAD_BATCHES):
        connection.send_in_turn(partial(encoded, batch(step=step)))
    last = threading.Thread(target=connection.send_in_turn, args=(partial(encoded, batch(step=4)),))
    last.start()
    last.join(0.5)
    assert last.is_alive()  # the window is full, and so is the queue before it
    assert len(one.hub.peer(0).incoming) == 2
    for step in range(2 + AHEAD_BATCHES + 1):
        received = take(one.hub, 0, "batch")
        assert (received.place, received.batch.step) == (step + 1, step)
        assert torch.equal(received.batch.tensors[0], batch(step=step).tensors[0])
    last.join(5)
    wait_until(lambda: connection._applied == 5)
    assert connection.outbox.kept_bytes == 0  # of a server that keeps nothing, nothing is kept for it
    connection.send(pb.ClientMessage(finished=pb.Finished()))
    one.hub.take([0], "finished")


def test_micro_batches_are_acknowledged_one_by_one(served):
    one = served()
    parts = [dataclasses.replace(batch(samples=2), before=before, after=4 - before) for before in (0, 2, 4)]
    connection = one.connect(window=2 * encoded(parts[0])[0].ByteSize() + 10)
    connection.send_in_turn(partial(encoded, *parts))
    for sent in parts[:2]:
        received = one.hub.take([0], "batch")[1]
        part = received.batch
        assert (len(part), part.before, part.after) == (2, sent.before, sent.after)
        assert (part.share, part.last) == (2 / 6, False)
    assert not one.hub.peer(0).incoming  # the third waits for the window
    one.hub.done(0, dataclasses.replace(received, place=1))
    one.hub.acknowledge(0)
    assert one.hub.take([0], "batch")[1].batch.last
    assert (connection._applied, connection.outbox.first, connection.outbox.last) == (1, 2, 3)


def test_arrival_order_starves_nobody(served):
    """Both have many batches waiting; each must be served in turn, although the first client's came first."""
    one = served(clients=2)
    connections = [one.connect(client=k) for k in range(2)]
    for k, connection in enumerate(connections):
        for step in range(4):
            connection.send_in_turn(partial(encoded, batch(client=k, step=step)))
    wait_until(lambda: all(len(one.hub.peer(k).incoming) == 4 for k in range(2)))
    assert [one.hub.take([0, 1], "batch")[0] for _ in range(8)] == [0, 1] * 4
    for connection in connections:
        connection.close()


def test_what_concerns_one_client_wakes_no_other_s_thread(served, monkeypatch):
    """A server has hundreds of them."""
    one = served(clients=2)
    connections = [one.connect(client=k) for k in range(2)]
    looked, behind = [], hub._behind
    monkeypatch.setattr(hub, "_behind", lambda peer, stream: (looked.append(peer.client), behind(peer, stream))[1])
    for step in range(20):
        connections[0].send_in_turn(partial(encoded, batch(step=step)))
        take(one.hub, 0, "batch")
    wait_until(lambda: connections[0]._applied == 20)
    assert looked.count(0) >= 20
    assert looked.count(1) <= 2  # to say that it lives
    for connection in connections:
        connection.close()


def wait_until(ready, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def raw_stream(address, limit=2**26):
    """A client without halfpass's checks: bytes in, bytes out."""
    channel = grpc.insecure_channel(address, options=[("grpc.max_send_message_length", limit)])
    outgoing: queue.SimpleQueue = queue.SimpleQueue()
    replies = channel.stream_stream(f"/{service.SERVICE}/{service.METHOD}")(iter(outgoing.get, None))
    return channel, outgoing, replies


def next_reply(replies):
    while True:
        message = pb.ServerMessage.FromString(next(replies))
        if message.WhichOneof("kind") != "alive":
            return message


JOIN = pb.ClientMessage(join=pb.Join(client=0, settings="{}")).SerializeToString()
CORRUPT = b"\xff\xff\xff garbage"


def written(value):
    """A batch with such an activation in it."""
    good = batch()
    values = good.tensors[0].index_fill(0, torch.tensor([2]), value)
    return messages.write_batch(dataclasses.replace(good, tensors=(values,)), "none")


def test_corrupt_message_is_rejected_and_the_next_good_one_is_served(served):
    one = served()
    channel, outgoing, replies = raw_stream(one.address)
    outgoing.put(JOIN)
    assert next_reply(replies).WhichOneof("kind") == "joined"
    bad_labels = CutBatch(0, 0, 0, (torch.zeros(1, *SHAPE),), torch.tensor([12]))
    for data, text in [
        (CORRUPT, f"message of client 0: expected a ClientMessage, found {len(CORRUPT)} bytes that are none"),
        (numbered(1, messages.write_batch(batch(client=1), "none")), "expected client 0, found client 1"),
        (numbered(2, messages.write_batch(bad_labels, "none")), "expected labels from 0 to 9, found 12"),
        (numbered(3, written(math.nan)), "batch of client 0, epoch 0, step 0, tensor 0: expected finite values, found NaN or infinity"),
        (numbered(4, written(math.inf)), "tensor 0: expected finite values, found NaN or infinity"),
        (numbered(5, written(3e38)), "tensor 0: expected finite values, found NaN or infinity"),
        (numbered(7, written(1)), "batch of client 0: expected number 6 in its sequence, found 7; both sides must"),
        (numbered(0, written(1)), "batch of client 0: expected number 6 in its sequence, found 0; both sides must"),
        (numbered(6, messages.write_batch(batch(), "none", test=True)), "batch of client 0: expected number 0 in its sequence, found 6"),
    ]:
        outgoing.put(data)
        assert text in next_reply(replies).rejected.reason
    outgoing.put(numbered(3, written(1)))  # which has come already: nobody learns from it twice
    outgoing.put(numbered(6, messages.write_batch(batch(), "none")))
    assert torch.equal(one.hub.take([0], "batch")[1].batch.tensors[0], batch().tensors[0])
    channel.close()


def test_a_flood_of_rejected_messages_has_an_end_and_is_logged(served, caplog):
    """Nobody reads the replies."""
    one = served()
    channel, outgoing, replies = raw_stream(one.address)
    outgoing.put(JOIN)
    assert next_reply(replies).WhichOneof("kind") == "joined"
    for _ in range(500):
        outgoing.put(CORRUPT)
    with pytest.raises(RunError, match="client 0: expected at most 100 messages that cannot be used, found more; the last was: message of client 0"):
        one.hub.take([0], "batch")
    *_, last = map(pb.ServerMessage.FromString, replies)
    assert last.failed.reason.startswith("client 0: expected at most 100 messages that cannot be used")
    assert one.hub.peer(0).rejected == 101  # of the others none was looked at
    assert caplog.text.count("rejected a message of client 0: message of client 0: expected a ClientMessage") == 100
    channel.close()


def test_a_client_that_sends_more_than_its_window_is_held_back(served):
    """The server's memory is bounded by the window whatever a client does, and nothing is lost."""
    window, message = 2**14, encoded(batch(samples=20))[0]
    one = served(window=window)
    channel, outgoing, replies = raw_stream(one.address)
    for data in [JOIN, *[numbered(place, message) for place in range(1, 21)]]:  # 40 kB
        outgoing.put(data)
    next_reply(replies)
    peer = one.hub.peer(0)
    wait_until(lambda: peer.incoming_bytes > window)
    time.sleep(0.2)  # in which all of them would come
    assert peer.incoming_bytes <= window + message.ByteSize() + 600
    for _ in range(20):
        assert len(one.hub.take([0], "batch")[1].batch) == 20
    channel.close()


def test_oversized_message_ends_that_stream_and_a_good_client_is_still_served(served):
    one = served(window=2**16)
    channel, outgoing, replies = raw_stream(one.address)
    outgoing.put(b"x" * (2**16 + 2**20 + 1))
    with pytest.raises(grpc.RpcError) as refused:
        next(replies)
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    channel.close()
    raw = socket.create_connection(("127.0.0.1", one.hub.port))  # no gRPC at all
    raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + struct.pack("<I", 2**31))
    raw.close()
    connection = one.connect(window=2**16)
    connection.send_in_turn(partial(encoded, batch()))
    assert one.hub.take([0], "batch")[1].batch.step == 0
    connection.close()


def test_first_message_must_be_join_and_numbers_are_taken_once(served):
    one = served()
    channel, outgoing, replies = raw_stream(one.address)
    outgoing.put(CORRUPT)
    failed = next_reply(replies).failed
    assert failed.reason.startswith("first message of a client: expected Join")
    assert failed.exit_status == 2
    channel.close()
    first = one.connect()
    for number, text in [(0, "expected a number that is free, found one that has joined already"),
                         (5, "expected a number from 0 to 0, found 5")]:  # fmt: skip
        with pytest.raises(RunError, match=text) as refused:
            one.connect(client=number)
        assert refused.value.exit_status == 2
    first.close()


def test_who_says_nothing_is_sent_away_and_a_good_client_is_served(served, monkeypatch):
    one = served()
    with monkeypatch.context() as patch:
        patch.setattr("halfpass.wire.hub.JOIN_SECONDS", 0.1)
        channel, _, replies = raw_stream(one.address)
        wait_until(lambda: not replies.is_active())
    assert replies.code() == grpc.StatusCode.CANCELLED
    channel.close()
    one.connect().close()


def test_who_has_said_join_is_given_time_to_be_admitted(served, monkeypatch):
    """By the server, and by the newcomer, which hears from it while the network is built."""
    monkeypatch.setattr("halfpass.wire.hub.JOIN_SECONDS", 0.2)
    one = served(admit=lambda join: time.sleep(3.0), timeout=1.0)
    connection = one.connect(timeout=1.0)
    connection.send_in_turn(lambda: encoded(batch()))
    assert one.hub.take([0], "batch")[1].batch is not None


def test_refusal_carries_its_reason(served):
    def admit(join):
        raise InputError("client 0 at joining", "model.cut 'a' (the server's)", "'b'", "start both alike")

    with pytest.raises(RunError, match=r"^client 0 at joining: expected model.cut 'a' \(the server's\), found 'b'; start"):
        served(admit=admit).connect()


def test_a_defect_while_reading_ends_the_run_at_once(served, monkeypatch):
    one = served()
    connection = one.connect()
    monkeypatch.setattr(messages, "read_batch", lambda message, buffers: 1 / 0)
    connection.send_in_turn(partial(encoded, batch()))
    with pytest.raises(RunError, match="client 0: expected a message that can be read, found ZeroDivisionError"):
        one.hub.take([0], "batch")
    connection.close()


def test_a_proxy_in_the_environment_is_not_asked(served, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    one = served()
    one.connect().close()


def test_a_sender_is_told_of_the_server_s_end_before_its_window_is_full(served):
    one = served()
    connection = one.connect()
    one.hub.fail("the server was stopped")
    wait_until(lambda: connection._failure is not None)
    with pytest.raises(RunError, match="the server was stopped"):
        connection.send_in_turn(partial(encoded, batch()))


def test_a_stream_without_end_message_is_an_abort(served):
    one = served()
    connection = one.connect()
    connection.close()
    with pytest.raises(RunError, match="client 0: expected its end message, found a stream that ended without it"):
        one.hub.take([0], "batch")


def test_a_client_s_reason_reaches_the_server_and_back(served):
    one = served(clients=2)
    first, second = one.connect(client=0), one.connect(client=1)
    first.fail("client 0, step 3: expected a finite loss, found nan; lower train.lr")
    with pytest.raises(RunError, match=r"^client 0, step 3: expected a finite loss, found nan") as raised:
        one.hub.take([1], "batch")
    one.hub.fail(str(raised.value))
    with pytest.raises(RunError, match="expected a finite loss, found nan"):
        second.receive("begin")


def test_every_wait_has_a_deadline_and_names_whom_it_waited_for(served):
    one = served(clients=2, timeout=20)
    began = time.monotonic()
    with pytest.raises(RunError, match=r"expected 2 clients within 0.3 s, found none with number 0, 1; start them"):
        one.hub.wait_for_clients(0.3)
    frozen = served(timeout=0.6)
    channel, outgoing, replies = raw_stream(frozen.address)
    outgoing.put(JOIN)
    next_reply(replies)
    with pytest.raises(RunError, match=r"client 0: expected a message or a sign of life within 0.6 s, found none"):
        frozen.hub.take([0], "batch")
    channel.close()
    assert time.monotonic() - began < 10


def test_either_end_says_that_it_is_alive_when_it_has_nothing_else_to_say(served, monkeypatch):
    for end in ("connection", "hub"):
        monkeypatch.setattr(f"halfpass.wire.{end}.heartbeat_seconds", lambda timeout: 0.05)
    one = served()
    connection = one.connect()
    stream, link = one.hub.peer(0).stream, connection._link
    by_server, by_client = stream.pulse.heard, link.pulse.heard
    wait_until(lambda: stream.pulse.heard > by_server and link.pulse.heard > by_client)
    connection.close()


def test_a_frozen_server_frees_a_sender_whose_window_is_full():
    """A listener that accepts and then says nothing, as a stopped process does."""
    handler = grpc.stream_stream_rpc_method_handler(say_joined_and_freeze)
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.SERVICE, {service.METHOD: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        size = messages.write_batch(batch(), "none").ByteSize()
        connection = Connection(f"127.0.0.1:{port}", window_bytes=size, timeout=0.8)
        connection.send(pb.ClientMessage(join=pb.Join()))
        connection.receive("joined")
        for step in range(1 + AHEAD_BATCHES):  # there is room for one
            connection.send_in_turn(partial(encoded, batch(step=step)))
        with pytest.raises(RunError, match=rf"server at 127.0.0.1:{port}: expected a message or a sign of life within"):
            connection.send_in_turn(partial(encoded, batch(step=3)))
        connection.close()
    finally:
        server.stop(0)


def say_joined_and_freeze(requests, context):
    next(requests)
    yield pb.ServerMessage(joined=pb.Joined()).SerializeToString()
    time.sleep(5)


def test_no_server_is_said_in_time(monkeypatch):
    monkeypatch.setattr(connection_end, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(InputError, match=rf"expected a halfpass server within 0.5 s, found none at 127.0.0.1:{port};"):
        Connection(f"127.0.0.1:{port}", window_bytes=2**20, timeout=5)


def test_port_in_use_is_said(served):
    one = served()
    with pytest.raises(InputError, match=rf"expected a free port, found 127.0.0.1:{one.hub.port}, which is in use; choose"):
        Hub(one.address, clients=1, window_bytes=1, timeout=1, admit=lambda j: None, check=lambda c, b: None)
    one.connect().close()


@pytest.mark.parametrize(("address", "text"), [
    ("0.0.0.0:0", "expected a loopback host .*, found '0.0.0.0'; make certificates with halfpass certs and give --tls.folder, or say --insecure"),
    ("10.1.2.3:7465", "expected a loopback host"),
    ("example.org:80", "expected a loopback host"),
    ("127.0.0.1", "expected HOST:PORT, found '127.0.0.1'"),
    ("127.0.0.1:http", "expected HOST:PORT"),
    ("127.0.0.1:99999", "expected HOST:PORT"),
])  # fmt: skip
def test_only_loopback_may_be_bound_or_joined(address, text):
    with pytest.raises(InputError, match=text):
        Hub(address, clients=1, window_bytes=1, timeout=1, admit=lambda j: None, check=lambda c, b: None)
    with pytest.raises(InputError, match=text):
        Connection(address, window_bytes=1, timeout=1)


def test_socket_bytes_are_those_that_passed_the_wire(served):
    """The kernel's count against a relay in between that counts what it forwards."""
    one = served()
    counted = {"up": 0, "down": 0}
    relay = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=forward, args=(relay, one.hub.port, counted), daemon=True).start()
    connection = Connection(f"127.0.0.1:{relay.getsockname()[1]}", window_bytes=2**22, timeout=10)
    connection.send(pb.ClientMessage(join=pb.Join(client=0, settings="{}")))
    connection.receive("joined")
    for step in range(20):
        connection.send_in_turn(partial(encoded, batch(step=step, samples=2000)))
        take(one.hub, 0, "batch")
    wait_until(lambda: connection._applied == 20)
    time.sleep(0.3)
    up, down = one.hub.socket_traffic(0)
    meter = one.hub.meter(0)
    assert up == counted["up"]
    assert down == counted["down"]
    assert 1 < up / meter.up.total() < 1.01
    connection.close()
    relay.close()


def forward(listener, port, counted):
    client, _ = listener.accept()
    server = socket.create_connection(("127.0.0.1", port))

    def pump(source, target, direction):
        with contextlib.suppress(OSError):  # the end of the test closes both
            while data := source.recv(65536):
                counted[direction] += len(data)
                target.sendall(data)

    threading.Thread(target=pump, args=(client, server, "up"), daemon=True).start()
    threading.Thread(target=pump, args=(server, client, "down"), daemon=True).start()


def test_what_a_peer_says_is_shown_as_it_is_written():
    assert str(PassedOnError("\x1b[2J\x07gone\nx")) == "\\x1b[2J\\x07gone\\nx"
    assert str(InputError("é", "a", "\u202e", "b")) == "é: expected a, found \\u202e; b"
    assert len(str(PassedOnError("a" * 10_000))) < 5000


def test_a_wait_for_a_peer_that_lives_is_said_on_either_side(served, monkeypatch, caplog):
    monkeypatch.setattr(service, "FIRST_WORD_SECONDS", 0.4)
    one = served(timeout=1.0)
    connection = one.connect(timeout=1.0)
    threads = [
        threading.Thread(target=lambda: one.hub.take([0], "batch", "epoch_end")), threading.Thread(target=lambda: connection.receive("begin")),
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    time.sleep(2.5)
    one.hub.send(0, pb.ServerMessage(begin=pb.Begin()))
    connection.send(pb.ClientMessage(epoch_end=pb.EpochEnd()))
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("waiting for")]
    assert sum("waiting for client 0 since" in line and "batch or epoch_end is to come, and signs of life alone have" in line for line in said) == 3
    assert sum(f"waiting for server at {one.address} since" in line and "begin is to come" in line for line in said) == 3
    connection.close()


def test_of_a_flood_of_refusals_some_are_logged_and_then_how_many_there_were(caplog, monkeypatch):
    caplog.set_level("INFO", logger="halfpass")
    monkeypatch.setattr(service, "REFUSALS_SECONDS", 0.3)
    time.sleep(0.4)
    for number in range(200):
        service.LOG.warning("refused %d", number, extra={"event": "refused"})
    service.LOG.warning("another matter")
    assert len(caplog.records) == service.MOST_REFUSALS + 1
    time.sleep(0.4)
    service.LOG.warning("refused %d", 200, extra={"event": "refused"})
    assert caplog.records[-1].getMessage() == "refused 200 (and 150 more before it)"
