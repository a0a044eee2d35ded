"""The server half of a finished run, at work: it answers clients whose client halves were trained with it."""

import logging
import time
from collections.abc import Callable

from torch import nn

from halfpass.arithmetic.precision import arithmetic
from halfpass.config import TlsConfig
from halfpass.errors import InputError
from halfpass.run import setup
from halfpass.run.children import leaving
from halfpass.run.credentials import SERVER, trust_of, trust_to_ask
from halfpass.run.network import Network
from halfpass.run.predictor import Above, check_code, server_half
from halfpass.run.saved import SavedRun
from halfpass.run.signature import Signature
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.answering import Agreed, Answerer, Asker, Expected
from halfpass.wire.hub import Hub

LOG = logging.getLogger("halfpass")
CLIENTS = 16  # whose questions are in memory at once, with some more; others are told to come again
LOOK_SECONDS = 0.2


def answer(
    saved: SavedRun, bind: str, announce: Callable[[int], None], tls: TlsConfig, *, insecure: bool = False,
    allow_code: bool = False,
) -> None:  # fmt: skip
    """Answers until this process is told to leave. It needs the server half's own files alone. `announce` gets the
    port. Raises InputError for what is missing, and where nobody would be kept out."""
    config = saved.config
    if config.method == "centralized" or config.model.edge_cut is not None:
        found = "method centralized" if config.method == "centralized" else "model.edge_cut, which makes three parts"
        remedy = "export the joined network, and predict in one place"
        raise InputError(str(saved.folders[0]), "a run with one cut", found, remedy)
    check_code(saved, allowed=allow_code)
    setup.settle_process(config)
    trust = trust_of(tls, SERVER)
    signature = saved.signature("server_half")
    network = saved.network(signature)
    place = arithmetic("cpu", config.train.precision)
    half = server_half(place, network.halves.server, saved.weights("server_half"))
    answerer = Answerer(half, _expected(network, signature, config.wire.codec, config.train.at_once))
    hub = Hub(
        bind, clients=CLIENTS, window_bytes=answerer.expected.most_bytes, timeout=config.wire.timeout,
        admit=_refuse, check=_refuse_batch, trust=trust, insecure=insecure, answer=answerer,
        status=lambda: pb.StatusReply(run=signature.run, phase="answering", epochs=config.train.epochs),
    )  # fmt: skip
    try:
        announce(hub.port)
        while not leaving():
            time.sleep(LOOK_SECONDS)
    finally:
        hub.stop()
        known = {"event": "done", "questions": answerer.questions, "samples": answerer.samples}
        LOG.info("answered %d questions of %d samples", answerer.questions, answerer.samples, extra=known)


def _expected(network: Network, signature: Signature, codec: str, most_samples: int) -> Expected:
    crossing, whole = network.crossing(test=True)
    agreed = Agreed(signature.run, network.cut, network.fingerprint, codec)
    return Expected(agreed, crossing, whole, network.reads(test=True), most_samples, network.task.shape)


def _refuse(join: pb.Join) -> None:
    expected, found = "a server that trains", "one that answers after training"
    raise InputError(f"client {join.client} at joining", expected, found, "give the address of halfpass serve")


def _refuse_batch(client: int, batch: pb.Batch) -> None:
    raise InputError(f"client {client}", "a question", "a batch", "use halfpass predict")


def asker(
    saved: SavedRun, address: str, tls: TlsConfig, signature: Signature, network: Network, *, insecure: bool = False
) -> Asker:
    """A client's way to the server half at that address."""
    config = saved.config
    if config.model.edge_cut is not None:
        found, remedy = "model.edge_cut, which makes three parts", "predict in one place, with all of them"
        raise InputError("--server", "a run with one cut", found, remedy)
    expected = _expected(network, signature, config.wire.codec, config.train.at_once)
    return Asker(
        address, expected.agreed, network.task.shape, limit_bytes=expected.most_bytes, timeout=config.wire.timeout,
        trust=trust_to_ask(tls), insecure=insecure,
    )  # fmt: skip


def above_at(asker: Asker, half: nn.Module) -> Above:
    """For a Predictor: what its client half lets cross, to the other side."""
    whole: int = getattr(half, "whole", 0)
    exact: frozenset[int] = getattr(half, "exact", frozenset())
    return lambda crossing: asker.ask(crossing[: len(crossing) - whole], crossing[len(crossing) - whole :], exact)
