"""`halfpass answer`: the server half of a finished run answers clients that have the client half."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from halfpass.config import LogConfig, TlsConfig
from halfpass.run import children, logs
from halfpass.run.answer_process import answer
from halfpass.run.children import Left, leave_when_told
from halfpass.run.saved import SavedRun

LOG = logging.getLogger("halfpass")


def answer_here(
    folders: Sequence[Path], bind: str, tls: TlsConfig, log: LogConfig, *, insecure: bool, allow_code: bool
) -> None:
    """Until this process is told to leave. Raises InputError for what cannot be served."""
    logs.begin(log, quiet=children.IS_CHILD)
    saved, host = SavedRun(folders), bind.rpartition(":")[0]
    if not children.IS_CHILD:
        leave_when_told()
    try:
        answer(saved, bind, _announce(host), tls, insecure=insecure, allow_code=allow_code)
    except Left:
        raise Left(kept=False) from None  # there is nothing to go on with


def _announce(host: str) -> Callable[[int], None]:
    def say(port: int) -> None:
        address = f"{host}:{port}"
        reached = f"HOST:{port}" if host in ("0.0.0.0", "[::]") else address
        print(f"answering on {address}: halfpass predict RUN INPUT --server {reached}", flush=True)
        LOG.info("listening on %s", address, extra={"event": "listening", "address": address})

    return say
