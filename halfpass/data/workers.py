"""Processes that draw samples for another one. Check: `pytest tests/test_own_data.py`."""

import multiprocessing
import os
import threading
from multiprocessing import connection


def draw_beside_threads() -> None:
    """Workers of this process are forked from a server from here on: a fork of a process with gRPC's threads can stand
    still for ever."""
    multiprocessing.set_forkserver_preload(["halfpass.data.batches"])
    multiprocessing.set_start_method("forkserver", force=True)


def end_with_parent(worker: int) -> None:
    """To be called in a worker. PyTorch's look after the process that forked them, which a fork server is, and would
    outlive the one that they draw for (findings/torch-dataloader-forkserver-orphans.sh)."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
