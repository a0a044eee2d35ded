"""A server whose clients are an engine's nodes: `serve` of `server_process.py`, in rounds."""

import secrets
from pathlib import Path
from typing import Any

from halfpass.config import Config
from halfpass.files import alone_in
from halfpass.run import setup, tracking
from halfpass.run.admission import Admission
from halfpass.run.children import for_peer
from halfpass.run.records import RunFolder, refuse_run
from halfpass.run.round_client import check_rounds_only
from halfpass.run.round_hub import Exchange, RoundHub
from halfpass.run.server_process import JOIN_SECONDS, ServerRun, run_to_end


def serve_rounds(config: Config, exchange: Exchange, engine: str) -> dict[str, Any]:
    """Serves one run to the written run folder `config.out`; returns what `result.json` holds, `engine` in it.

    Raises InputError, with nothing written, where the settings cannot be used or the nodes do not fit them, and
    RunError where the training cannot go on.
    """
    check_rounds_only(config)
    setup.check_between_processes(config)
    tracking.check(config)
    setup.check_unsharded(config)
    out: Path = config.folder
    refuse_run(out)
    setup.settle_process(config)
    admission, name = Admission(config), secrets.token_hex(8)
    hub = RoundHub(
        exchange, config, run=name, admit=admission.admit, check=admission.check,
        check_values=admission.check_values, keep_uploads=setup.keeps_uploads(config),
    )  # fmt: skip
    try:
        hub.wait_for_clients(JOIN_SECONDS)
        assert admission.network is not None
        with setup.open_store(config, admission.network) as store, alone_in(out):
            folder = RunFolder.create(out, config)
            return run_to_end(config, folder, ServerRun(config, hub, admission, store, None, run=name), engine)
    except BaseException as error:
        hub.fail(*for_peer("server", error))
        raise
