"""What `round_hub.py` wants of an engine, by NVFlare's calls to sites."""

import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from nvflare.collab import CollabCallError

from halfpass.errors import RunError
from halfpass.run.round_hub import Reply

PAUSE_SECONDS = 2.0  # for which a site that could not be reached is not called again
CLOSE_SECONDS = 10.0  # for the last calls


class CollabExchange:
    """A call to a site is a thread's, so that what is large comes while the server trains."""

    def __init__(self, sites: Mapping[int, Any], seconds: float, aborted: Callable[[], bool]) -> None:
        """`sites`: NVFlare's proxies, by client; `seconds`: how long a call may take."""
        self._sites, self._seconds, self._aborted = sites, seconds, aborted
        self._back = dict.fromkeys(sites, 0.0)  # when a site may be called again
        self._come: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self._calls: set[threading.Thread] = set()

    def nodes(self) -> Collection[int]:
        """The clients whose sites can be called. NVFlare starts no job without all of them."""
        now = time.monotonic()
        return [node for node, back in self._back.items() if now >= back]

    def send(self, node: int, message: bytes) -> None:
        self._calls = {call for call in self._calls if call.is_alive()}
        call = threading.Thread(target=self._call, args=(node, message), name=f"site of client {node}", daemon=True)
        self._calls.add(call)
        call.start()

    def receive(self, seconds: float) -> Reply | None:
        if self._aborted():
            raise RunError("NVFlare", "a job that goes on", "it was aborted", "start it again")
        try:
            reply = self._come.get(timeout=seconds) if seconds > 0 else self._come.get_nowait()
        except queue.Empty:
            return None
        if reply.failure:
            self._back[reply.node] = time.monotonic() + PAUSE_SECONDS
        return reply

    def close(self) -> None:
        """Once the last messages have gone, those that say why a run ends."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for call in self._calls:
            call.join(max(0.0, deadline - time.monotonic()))

    def _call(self, node: int, message: bytes) -> None:
        site = self._sites[node]
        try:
            answer = site(timeout=self._seconds).answer(message)
        except CollabCallError as error:  # of the site's own code there is a traceback
            self._come.put(Reply(node, failure=f"site {site.name}: {error.cause}", again=not error.remote_traceback))
        except Exception as error:
            self._come.put(Reply(node, failure=f"site {site.name}: {error!r}"))
        else:
            wrong = "" if isinstance(answer, bytes) else f"site {site.name} answered {type(answer).__name__}, not bytes"
            self._come.put(Reply(node, failure=wrong) if wrong else Reply(node, answer))
