"""A client of a run in rounds: one message comes, one reply goes (`round_hub.py` is the other end).

In it is `ClientRun`, as in any run. What it was before its newest message and what it is behind that are both on disk,
so that a message which is sent again, perhaps to another process, is answered alike.
"""

import logging
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from halfpass.config import CLIENT, Config, as_dict
from halfpass.data.datasets import Dataset, Samples
from halfpass.errors import HalfpassError, InputError, PassedOnError, RunError
from halfpass.files import make_folder
from halfpass.run import checkpoint, setup
from halfpass.run.children import for_peer
from halfpass.run.client_process import ClientRun, client_folder, join_of_client
from halfpass.run.network import Network, network_of
from halfpass.run.records import RunFolder, refuse_changes
from halfpass.run.signature import signature_of, write_signature
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.frames import NO_RUN, Frames, pack, unpack
from halfpass.wire.messages import few_parts
from halfpass.wire.outbox import Outbox

LOG = logging.getLogger("halfpass")
MOST_ORDERS = 10  # in one message
PLACE = "the server's message"


class _RoundOver(Exception):
    """All that the message asked for is done."""


class _Connection:
    """What `ClientRun` takes for its way to the server: the orders of one message, and the reply to it."""

    def __init__(self, run: str) -> None:
        self.run, self.outbox = run, Outbox()
        self.orders: deque[pb.ServerMessage] = deque()
        self.reply: list[bytes] = []

    def receive(self, *kinds: str) -> pb.ServerMessage:
        if not self.orders:
            raise _RoundOver
        order = self.orders.popleft()
        if (found := order.WhichOneof("kind")) not in kinds:
            raise RunError("the server", " or ".join(kinds), str(found), "both sides must run the same halfpass")
        return order

    def send(self, *messages: pb.ClientMessage) -> None:
        self.reply += [message.SerializeToString() for message in messages]

    def send_in_turn(self, make: Callable[[], Sequence[pb.ClientMessage]]) -> None:
        self.send(*make())

    def drain(self) -> None:
        """Nothing waits."""

    def go_on_anew(self) -> None:
        """A server in rounds never says so."""

    def keep(self, taken: int) -> None:
        """What is kept is on disk before the reply goes."""

    def state(self) -> dict[str, Any]:
        return {"run": self.run, "taken": 0}


class RoundClient:
    """Client `index` of a run with these settings."""

    def __init__(self, config: Config, index: int) -> None:
        setup.check_index(config, index)
        check_rounds_only(config)
        setup.check_between_processes(config)
        setup.settle_process(config)
        self.config, self.index, self._own = config, index, client_folder(config.folder, index)
        self._behind: tuple[str, int] | None = None  # run and number of the message that `_run` is behind
        self._run: ClientRun | None = None

    def answer(self, message: bytes) -> bytes:
        """The reply: what a client's stream would have said. A failure is said in it, too."""
        try:
            frames, orders = read_orders(message)
            answered = self._join(frames.run) if frames.number == 0 else self._do(frames.run, frames.number, orders)
            return pack(frames.number, frames.run, answered)
        except Exception as error:
            if not isinstance(error, PassedOnError):
                LOG.error("client %d: %s", self.index, error, exc_info=not isinstance(error, HalfpassError))
            self._behind = None
            return refusal(message, f"client {self.index}", error)

    def _join(self, run: str) -> list[bytes]:
        """`run` is named where it goes on already, and this client has perhaps written what it was to."""
        if run == NO_RUN:
            RunFolder.for_client(self.config.folder, self.index)
        data, shard, network = _part(self.config, self.index)
        join = join_of_client(self.config, data, shard, network, self.index)
        return [pb.ClientMessage(join=join).SerializeToString()]

    def _do(self, name: str, number: int, orders: Sequence[pb.ServerMessage]) -> list[bytes]:
        kinds = [order.WhichOneof("kind") for order in orders]
        if "failed" in kinds:
            said = orders[kinds.index("failed")].failed
            raise PassedOnError(said.reason, said.exit_status)
        weights = self.config.folder / f"client-{self.index}.safetensors"
        if kinds[-1:] == ["finish"] and not self._own.exists() and weights.is_file():  # it is sent again
            return [pb.ClientMessage(finished=pb.Finished()).SerializeToString()]
        if self._run is None or self._behind != (name, number - 1):
            self._run = self._taken_up(name, number - 1)
        self._behind, run = None, self._run
        connection = run.connection
        assert isinstance(connection, _Connection)
        connection.orders, connection.reply = deque(orders), []
        try:
            run.follow()
        except _RoundOver:
            self._keep(run, name, number)
            self._behind = name, number
            return connection.reply
        data, _, network = _part(self.config, self.index)
        signature = write_signature(signature_of(self.config, network, connection.run, data))
        RunFolder(self.config.folder).save_client(run.client, self.config, signature)
        shutil.rmtree(self._own, ignore_errors=True)
        connection.send(pb.ClientMessage(finished=pb.Finished()))
        return connection.reply

    def _taken_up(self, run: str, number: int) -> ClientRun:
        """As it was behind that message of the run."""
        data, shard, network = _part(self.config, self.index)
        client = setup.build_client(self.config, network, self.index)
        made = ClientRun(self.config, _Connection(run), client, data, shard, network.task)
        if number > 0:
            state = checkpoint.read(self._file(number), run)
            refuse_changes(self._file(number), self.config, state["settings"])
            made.load_state(state)
        return made

    def _keep(self, run: ClientRun, name: str, number: int) -> None:
        make_folder("out", self._own)
        checkpoint.write(self._file(number), name, run.state())
        for file in self._own.glob("message-*.pt"):
            if file not in (self._file(number), self._file(number - 1)):
                file.unlink(missing_ok=True)

    def _file(self, number: int) -> Path:
        return self._own / f"message-{number}.pt"


def read_orders(message: bytes) -> tuple[Frames, list[pb.ServerMessage]]:
    """A server's message, and what it asks for. Raises InputError where it is none."""
    frames, orders = unpack(PLACE, message, MOST_ORDERS), list[pb.ServerMessage]()
    for frame in frames.messages:
        data = bytes(frame)
        try:
            orders.append(pb.ServerMessage.FromString(data if few_parts(data) else b"?"))
        except DecodeError:
            remedy = "both sides must run the same halfpass"
            raise InputError(PLACE, "orders that can be read", "others", remedy) from None
    return frames, orders


def refusal(message: bytes, who: str, error: Exception) -> bytes:
    """The reply to a message that cannot be answered."""
    try:
        frames = unpack(PLACE, message, MOST_ORDERS)
        number, run = frames.number, frames.run
    except InputError:
        number, run = 0, NO_RUN
    reason, status = for_peer(who, error)
    failed = pb.ClientMessage(failed=pb.Failed(reason=reason, exit_status=status))
    return pack(number, run, [failed.SerializeToString()])


def check_rounds_only(config: Config) -> None:
    """Raises InputError for what needs an answer within a round."""
    if config.method != "decoupled":
        remedy = "give method decoupled, or use halfpass serve and join"
        raise InputError("method", "decoupled in rounds, where nothing comes back for a batch", config.method, remedy)
    if config.model.edge_cut is not None:
        remedy = "leave it out, or use halfpass serve and join"
        raise InputError("model.edge_cut", "none in rounds", repr(config.model.edge_cut), remedy)
    if (every := config.train.feedback_every) is not None:
        expected, remedy = "none in rounds: no gradient comes back", "leave it out, or use halfpass serve and join"
        raise InputError("train.feedback_every", expected, str(every), remedy)
    if config.wire.reconnect == 0:
        raise InputError("wire.reconnect", "seconds that a round may take", "0", "raise it")


def _part(config: Config, index: int) -> tuple[Dataset, Samples, Network]:
    """The client's data, of them its training samples, and the network: read once for all clients of one process."""
    own = CLIENT in (config.data.path or "")
    data, shards, network = _shared(_Same(config), index if own else 0)
    return data, shards[index], network


class _Same:
    """Settings, to be compared by what they say."""

    def __init__(self, config: Config) -> None:
        self.config, self._said = config, repr(as_dict(config))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._said == self._said

    def __hash__(self) -> int:
        return hash(self._said)


@lru_cache(maxsize=1)
def _shared(same: _Same, site: int) -> tuple[Dataset, list[Samples], Network]:
    config = same.config
    data = setup.load_data(config.data, site)
    shards = setup.make_shards(config, data)
    return data, shards, network_of(config, data, setup.task_of(config, data))
