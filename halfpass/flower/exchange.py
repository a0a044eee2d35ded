"""What `round_hub.py` wants of an engine, by Flower's Grid."""

import collections
import logging
import queue
import threading
import time
from collections.abc import Collection

from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from halfpass.errors import InputError, RunError
from halfpass.run.round_hub import Reply

LOG = logging.getLogger("halfpass")
NODES_SECONDS = 20.0  # for as many nodes as there are clients to come
FIRST_PAUSE, LONGEST_PAUSE = 0.02, 0.5  # seconds between two looks for replies
LOCK_SECONDS = 5.0
NAME, STYPE = "halfpass", "halfpass.messages"
MOST_FAILURES = 10  # of the grid itself, one behind the other
_FINAL = {  # codes of flwr.app.Error
    1: "the client's app could not be loaded", 2: "the client's app raised an error",
    6: "a mod refused the message", 7: "the app's bundle is not valid",
}  # fmt: skip


def as_record(data: bytes) -> RecordDict:
    """One large array of bytes, which Flower carries as it is."""
    array = Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)
    return RecordDict({NAME: ArrayRecord({NAME: array})})


def of_record(content: RecordDict, place: str) -> bytes:
    """The inverse of `as_record`. Raises InputError for any other content."""
    record = content.array_records.get(NAME)
    array = None if record is None else record.get(NAME)
    if array is None or array.stype != STYPE:
        raise InputError(place, "a message of halfpass", "another", "both apps must be halfpass's")
    return bytes(array.data)


def _reply(node: int, content: RecordDict) -> Reply:
    try:
        return Reply(node, of_record(content, "its reply"))
    except InputError as error:
        return Reply(node, failure=str(error))


class FlowerExchange:
    """A Grid, which one thread of its own uses: what is large comes while the server trains."""

    def __init__(self, grid: Grid, clients: int, ttl: float, kind: str = MessageType.TRAIN) -> None:
        """`ttl`: seconds after which Flower gives a message up; `kind`: which function of the ClientApp answers it."""
        self._grid, self._clients, self._ttl, self._kind = grid, clients, ttl, kind
        self._to_send: collections.deque[tuple[int, bytes]] = collections.deque()
        self._come: queue.SimpleQueue[Reply | Exception] = queue.SimpleQueue()
        self._nodes: list[int] = []
        self._known: list[int] = []  # as they were last
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="flower", daemon=True)
        self._thread.start()

    def nodes(self) -> Collection[int]:
        """As they are now; at first waits for as many as there are clients."""
        deadline = time.monotonic() + NODES_SECONDS
        while True:
            if not self._lock.acquire(timeout=LOCK_SECONDS):  # the SuperLink does not answer
                return self._known
            try:
                nodes = self._known = sorted(self._grid.get_node_ids())
            finally:
                self._lock.release()
            if len(nodes) >= self._clients or self._nodes or time.monotonic() > deadline:
                self._nodes = self._nodes or nodes
                return nodes
            time.sleep(0.2)

    def send(self, node: int, message: bytes) -> None:
        self._to_send.append((node, message))

    def receive(self, seconds: float) -> Reply | None:
        try:
            found = self._come.get(timeout=seconds) if seconds > 0 else self._come.get_nowait()
        except queue.Empty:
            return None
        if isinstance(found, Exception):
            raise RunError("Flower", "a grid that carries messages", repr(found), "see the SuperLink's log") from found
        return found

    def close(self) -> None:
        """Once the messages that wait have gone."""
        self._stopped.set()
        self._thread.join(10)

    def _work(self) -> None:
        waiting: dict[str, int] = {}  # nodes, by the number of the message that is theirs
        pause, failures = FIRST_PAUSE, 0
        while self._to_send or not self._stopped.is_set():
            try:
                moved = self._send_all(waiting) + self._take_all(waiting)
                failures = 0
            except Exception as error:  # of the connection to the SuperLink, which may come back
                failures += 1
                if failures > MOST_FAILURES:
                    self._come.put(error)
                    return
                LOG.warning("Flower: %s; trying again", error, extra={"event": "lost"})
                moved = 0
            pause = FIRST_PAUSE if moved else min(2 * pause, LONGEST_PAUSE)
            self._stopped.wait(pause)

    def _send_all(self, waiting: dict[str, int]) -> int:
        sent = 0
        while self._to_send:
            node, data = self._to_send[0]
            message = Message(as_record(data), node, self._kind, ttl=self._ttl)
            with self._lock:
                (number,) = self._grid.push_messages([message])
            self._to_send.popleft()  # unless the grid raised
            if not number:
                self._come.put(Reply(node, failure="Flower did not take a message for it", again=True))
            else:
                waiting[number] = node
            sent += 1
        return sent

    def _take_all(self, waiting: dict[str, int]) -> int:
        if not waiting:
            return 0
        with self._lock:
            replies = list(self._grid.pull_messages(list(waiting)))
        for reply in replies:
            node = waiting.pop(reply.metadata.reply_to_message_id, None)
            if node is None:
                continue
            if reply.has_error():
                final = _FINAL.get(reply.error.code)
                why = final or f"Flower's error {reply.error.code}"
                self._come.put(Reply(node, failure=f"{why} ({reply.error.reason})", again=final is None))
            else:
                self._come.put(_reply(node, reply.content))
        return len(replies)
