"""Who misbehaves is dropped with the reason, and waited for as one that is lost; the others' calls find their threads, and
no identity is there twice."""

import contextlib
import logging
import queue
import threading
import time

import grpc
import pytest
import torch

from halfpass.commands.certs import make_certificates
from halfpass.config import TlsConfig
from halfpass.cut import CutBatch
from halfpass.errors import PassedOnError, RunError
from halfpass.run.credentials import trust_of
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire import hub as hub_side
from halfpass.wire.asking import ask_status
from halfpass.wire.connection import Connection, channel_to
from halfpass.wire.hub import ClientLost, Hub, Misbehaved
from halfpass.wire.messages import write_batch
from halfpass.wire.service import METHOD, SERVICE

ALIVE = {"alive": pb.Alive()}
MADE = []


@pytest.fixture(autouse=True)
def _all_leave():
    yield
    while MADE:
        MADE.pop().leave()


class Raw:
    """A client that says whatever it is told to."""

    def __init__(self, hub, client=0, trust=None, say_join=True, **join):
        MADE.append(self)  # a channel that nobody holds is closed
        self.said = queue.Queue()
        self.channel = channel_to(f"127.0.0.1:{hub.port}", trust, 2**26)
        metadata = [] if trust is None else trust.metadata()
        call = self.channel.stream_stream(f"/{SERVICE}/{METHOD}", response_deserializer=pb.ServerMessage.FromString)
        self.replies = call(iter(self.said.get, None), timeout=30, metadata=metadata)
        if say_join:
            self.say(join=pb.Join(client=client, **({"first": 1} | join)))

    def say(self, **message):
        self.said.put(pb.ClientMessage(**message).SerializeToString())

    def say_batch(self, place, step):
        message = write_batch(CutBatch(0, 0, step, (torch.ones(2, 3),), torch.zeros(2, dtype=torch.int64)), "none")
        message.place = place
        self.said.put(message.SerializeToString())

    def hear(self, kind):
        return getattr(next(message for message in self.replies if message.WhichOneof("kind") == kind), kind)

    def joined(self):
        self.hear("joined")
        return self

    def leave(self):
        self.said.put(None)
        self.channel.close()


@contextlib.contextmanager
def served(clients=2, timeout=10, reconnect=30.0, run="it", **options):
    hub = Hub(
        "127.0.0.1:0", clients=clients, window_bytes=2**20, timeout=timeout, admit=lambda join: None,
        check=lambda client, batch: None, reconnect=reconnect, run=run, **options,
    )  # fmt: skip
    try:
        yield hub
    finally:
        hub.stop()


def wait_until(holds, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def worked_off(hub, client):
    _, received = hub.take([client], "batch")
    hub.done(client, received)
    return received.batch.step


# --- dropped, and what comes of it -------------------------------------------------------------------------------------


def test_a_dropped_client_is_told_why_and_a_mended_process_goes_on_where_the_server_is(caplog):
    caplog.set_level(logging.INFO, "halfpass")
    with served() as hub:
        one, other = Raw(hub, 0, process=7).joined(), Raw(hub, 1, process=8).joined()
        for place in (1, 2, 3):
            one.say_batch(place, place - 1)
        assert worked_off(hub, 0) == 0
        hub.take([0], "batch")
        hub.drop(0, Misbehaved(0, "step 1", "step 5", "mend it"))  # for the second, which is at work
        assert one.hear("failed").reason == "client 0: expected step 1, found step 5; mend it"
        assert "dropped client 0: client 0: expected step 1, found step 5; mend it; waiting for it for 30 s" in caplog.text
        other.say_batch(1, 0)
        assert worked_off(hub, 1) == 0  # others go on
        same = Raw(hub, 0, process=7, run="it").hear("failed")
        assert same.reason.startswith("client 0 at joining: expected another process, found the one that was dropped: client 0: expected step 1")
        mended = Raw(hub, 0, process=9, run="it")
        assert mended.hear("joined").received == 1  # the second and third have not come
        mended.say_batch(2, 1)
        assert worked_off(hub, 0) == 1
        assert hub.look()[0].dropped == 1


def test_whoever_is_dropped_three_times_is_refused():
    with served(clients=1) as hub:
        for number in range(hub_side.MOST_DROPPED):
            one = Raw(hub, process=number + 1).joined()
            hub.drop(0, Misbehaved(0, "this", "that", "mend it"))
            one.hear("failed")
        failed = Raw(hub, process=9).hear("failed")
        assert "expected a client that was dropped less than 3 times, found one that was for the last time as follows: client 0: expected this" in failed.reason


def test_a_dropped_client_that_does_not_come_back_ends_the_run_with_the_reason():
    with served(clients=1, reconnect=0.3) as hub:
        Raw(hub).joined()
        hub.drop(0, Misbehaved(0, "this", "that", "mend it"))
        with pytest.raises(RunError, match=r"client 0: expected a connection, or another one, found none for 0.3 s, after: client 0: expected this, found that"):
            hub.take([0], "batch")


def test_with_a_quorum_it_is_given_up_at_once():
    with served(quorum=1) as hub:
        for k in range(2):
            Raw(hub, k).joined()
        hub.drop(0, Misbehaved(0, "this", "that", "mend it"))
        with pytest.raises(ClientLost, match="expected this, found that"):
            hub.take([0, 1], "batch")
        hub.give_up(0)
        assert Raw(hub, 0, run="it", process=3).hear("joined").anew


@pytest.mark.parametrize("options", [{"watched": True}, {"reconnect": 0.0}, {"run": ""}])
def test_where_nobody_can_come_back_the_run_ends_at_once(options):
    with served(**options) as hub:
        one = Raw(hub, 0).joined()
        Raw(hub, 1).joined()
        one.say(failed=pb.Failed(reason="client 0: no data", exit_status=2))
        with pytest.raises(PassedOnError, match="client 0: no data") as raised:
            hub.take([1], "batch")
        assert raised.value.exit_status == 2


def test_a_client_that_fails_before_training_has_left_and_may_join_again(caplog):
    with served() as hub:
        one = Raw(hub, 0, process=1).joined()
        Raw(hub, 1, process=2).joined()
        one.say(failed=pb.Failed(reason="client 0: no data", exit_status=2))
        one.hear("failed")
        assert "client 0 left: client 0: no data; waiting for it for 30 s" in caplog.text
        with pytest.raises(RunError, match=r"expected 2 clients within 0 s, found none with number 0; 0 left: client 0: no data; start them"):
            hub.wait_for_clients(0)
        Raw(hub, 0, process=3).joined()
        hub.wait_for_clients(5)


def test_a_message_out_of_turn_drops_its_client():
    with served(clients=1) as hub:
        one = Raw(hub, process=1).joined()
        one.say(epoch_end=pb.EpochEnd(), place=1)
        taken = threading.Thread(target=lambda: worked_off(hub, 0))
        taken.start()
        assert one.hear("failed").reason.startswith("client 0: expected batch, found epoch_end;")
        mended = Raw(hub, process=2)
        assert mended.hear("joined").received == 0
        mended.say_batch(1, 0)
        taken.join(10)
        assert not taken.is_alive()
        assert hub.take_ends([0]) is None  # that end has not come


def test_ends_that_are_put_back_come_again():
    with served() as hub:
        both = [Raw(hub, k, process=k + 1).joined() for k in range(2)]
        for k, one in enumerate(both):
            one.say(epoch_end=pb.EpochEnd(epoch=k), place=1)
        wait_until(lambda: all(hub.peer(k).ends for k in range(2)))
        ends = hub.take_ends([0, 1])
        hub.untake_ends(ends)
        hub.drop(0, Misbehaved(0, "this", "that", "mend it"))
        assert hub.take_ends([0, 1]) is None
        Raw(hub, 0, process=9, run="it").say(epoch_end=pb.EpochEnd(epoch=5), place=1)
        wait_until(lambda: hub.peer(0).ends)
        assert {k: end.epoch for k, end in hub.take_ends([0, 1]).items()} == {0: 5, 1: 1}
        for k in range(2):
            hub.done(k, hub.take([k], "epoch_end")[1])
        assert [hub.peer(k).ended for k in range(2)] == [0, 0]


# --- floods ------------------------------------------------------------------------------------------------------------


def test_what_has_come_before_is_ignored_once_and_a_flood_of_it_ends():
    with served(clients=1) as hub:
        one = Raw(hub, process=1).joined()
        for place in (1, 2):
            one.say_batch(place, place - 1)
        assert [worked_off(hub, 0) for _ in range(2)] == [0, 1]
        again = Raw(hub, process=1, run="it").joined()
        for place in (1, 2):
            again.say_batch(place, place - 1)
        again.say_batch(3, 2)
        assert worked_off(hub, 0) == 2
        assert hub.peer(0).rejected == 0
        again.say_batch(2, 1)
        assert "expected number 4 in its sequence, found 2" in again.hear("rejected").reason
        for _ in range(hub_side.MOST_REJECTED):
            again.say_batch(2, 1)
        assert "at most 100 messages that cannot be used" in again.hear("failed").reason


def test_a_flood_of_signs_of_life_ends():
    with served(clients=1) as hub:
        one = Raw(hub).joined()
        for _ in range(90):
            one.say(**ALIVE)
        one.say_batch(1, 0)
        assert worked_off(hub, 0) == 0
        for _ in range(50):
            one.say(**ALIVE)
        assert "client 0: expected at most 100 signs of life, and 4 a second, found more" in one.hear("failed").reason


def test_whoever_reads_nothing_holds_no_thread(monkeypatch):
    """What it was to read goes with its stream."""
    monkeypatch.setattr(hub_side, "STOP_SECONDS", 0.2)
    with served(clients=1) as hub:
        Raw(hub).joined()
        for _ in range(30):
            hub.send(0, pb.ServerMessage(take=pb.Take(weights=[pb.Tensor(data=bytes(2**20))])))
        stream = hub.peer(0).stream
        hub.drop(0, Misbehaved(0, "this", "that", "mend it"))
        wait_until(lambda: not stream.context.is_active())


# --- calls of one caller, and identities --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys") / "keys"
    make_certificates(folder, clients=2, tokens=True)
    return folder


def of(keys, role):
    return trust_of(TlsConfig(folder=str(keys)), role)


def test_one_member_s_silent_streams_leave_room_for_the_others(keys):
    with served(trust=of(keys, "server")) as hub:
        member, honest = of(keys, "client-1"), of(keys, "client-0")
        silent = [Raw(hub, 1, member, say_join=False) for _ in range(12)]
        wait_until(lambda: sum(not one.replies.is_active() for one in silent) == len(silent) - hub_side.MOST_CALLS)
        over = next(one for one in silent if not one.replies.is_active())
        assert over.replies.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "client 1: expected at most 4 calls at once that have not joined, found more" in over.replies.details()
        ask_status(f"127.0.0.1:{hub.port}", honest)
        Raw(hub, 0, honest).joined()


def test_streams_of_one_client_are_few_a_second_and_its_connections_are_one(keys, monkeypatch):
    monkeypatch.setattr(hub_side, "STREAMS_AT_ONCE", 4)
    with served(trust=of(keys, "server")) as hub:
        trust = of(keys, "client-0")
        made = [Raw(hub, 0, trust, process=5, run="it").joined() for _ in range(4)]
        wait_until(lambda: len(hub._front._peers) == 1)
        with pytest.raises(grpc.RpcError) as refused:
            Raw(hub, 0, trust, process=5, run="it").joined()
        assert "client 0: expected at most 4 streams at first, and 1 a second, found more" in refused.value.details()
        assert made[-1].replies.is_active()


def test_without_tls_the_oldest_silent_call_makes_room(monkeypatch):
    monkeypatch.setattr(hub_side, "MORE_STREAMS", 2)
    with served(clients=1) as hub:
        silent = [Raw(hub, say_join=False) for _ in range(5)]
        wait_until(lambda: sum(one.replies.is_active() for one in silent) == 3)
        Raw(hub).joined()


def test_a_question_that_is_never_asked_ends(monkeypatch):
    monkeypatch.setattr(hub_side, "JOIN_SECONDS", 0.2)
    with served() as hub, channel_to(f"127.0.0.1:{hub.port}", None, 2**20) as channel:
        call = channel.stream_unary("/grpc.health.v1.Health/Check").future(iter(queue.Queue().get, None), timeout=20)
        wait_until(call.done)
        assert call.code() == grpc.StatusCode.CANCELLED


def test_a_second_process_of_a_client_is_refused_while_the_first_one_lives(monkeypatch):
    monkeypatch.setattr("halfpass.wire.connection.heartbeat_seconds", lambda timeout: 0.05)
    with served(clients=1, timeout=2.0) as hub:
        address = f"127.0.0.1:{hub.port}"
        first = Connection(address, window_bytes=2**20, timeout=2.0, reconnect=20)
        first.send(pb.ClientMessage(join=pb.Join(client=0)))
        first.receive("joined")
        second = Raw(hub, process=5, run="it").hear("failed")
        assert "expected a number that is free, found one that has joined already, and is connected" in second.reason
        stream = hub.peer(0).stream
        first._link.call.cancel()  # its own next stream is let in at once
        wait_until(lambda: hub.peer(0).stream not in (None, stream) and first._away is None)
        first.close()
        Raw(hub, process=5, run="it").joined()


def test_a_second_process_takes_over_once_the_first_one_is_silent():
    """As one whose machine has lost its power: the connection stays, and nothing comes on it."""
    with served(clients=1, timeout=1.0) as hub:
        Raw(hub, process=4).joined()
        stream, began = hub.peer(0).stream, time.monotonic()
        assert Raw(hub, process=5, run="it").hear("joined").run == "it"
        assert 0.3 < time.monotonic() - began < 5
        wait_until(lambda: not stream.context.is_active())
