"""Figures for Prometheus, read from what a server or client counts anyway, when they are asked for.

docs/how-to/monitor.md lists them. Tests: tests/test_operating.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from halfpass.config import MetricsConfig
from halfpass.errors import InputError
from halfpass.run.overview import BOUNDS, Overview, Pace
from halfpass.wire.connection import Connection

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

LOG = logging.getLogger("halfpass")


class Figures(Protocol):
    """`ServerFigures` or `ClientFigures`."""

    def collect(self) -> Iterator[Metric]: ...


Register = Callable[[Figures], None]


def to_nobody(figures: Figures) -> None:
    """A `Register` where no port is given."""


@contextmanager
def listening(metrics: MetricsConfig) -> Iterator[Register]:
    """Gives what takes figures, which are at http://HOST:PORT/metrics meanwhile. Raises InputError where the port is in
    use."""
    if metrics.port is None:
        yield to_nobody
        return
    from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

    host = metrics.host.strip("[]")
    registry = CollectorRegistry()  # not the one that all of a program shares
    try:
        server, _ = start_http_server(metrics.port, host, registry)
    except (OSError, UnicodeError) as error:
        found = f"{metrics.host}:{metrics.port} ({getattr(error, 'strerror', None) or error})"
        raise InputError("metrics.port", "a free port of this machine", found, "choose another") from None
    ProcessCollector(registry=registry)
    try:
        where = f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}/metrics"
        LOG.info("metrics at %s", where, extra={"event": "metrics", "address": where})
        yield registry.register
    finally:
        server.shutdown()
        server.server_close()


def _family(kind: str, name: str, what: str, samples: Sequence[tuple[Sequence[str], float]], *labels: str) -> Metric:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    made = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}[kind](f"halfpass_{name}", what, labels=labels)
    for values, value in samples:
        made.add_metric(values, value)
    return made


def _gauge(name: str, what: str, value: float) -> Metric:
    return _family("gauge", name, what, [((), value)])


class ServerFigures:
    """Of a server."""

    def __init__(self, overview: Overview) -> None:
        self._overview = overview

    def collect(self) -> Iterator[Metric]:
        overview = self._overview
        at, pace, looks = overview.position, overview.pace, overview.clients()
        yield _gauge("clients", "Clients that the run has.", overview.config.clients.count)
        yield _gauge("connected_clients", "Clients that are there.", sum(look.away is None for look in looks))
        yield _gauge("epoch", "Epoch that goes on, from 1; 0 before the first.", at.epoch)
        yield _gauge("epochs", "Epochs that the run has.", overview.config.train.epochs)
        yield _gauge("epoch_step", "Steps of this epoch that are done, all clients'.", sum(at.steps.values()))
        yield _gauge("epoch_steps", "Steps that an epoch has, all clients'.", sum(overview.steps))
        yield _gauge("training_loss", "Of the server half, mean of this epoch so far.", at.loss)
        yield _family("counter", "samples", "Samples that were learned from.", [((), pace.samples)])
        yield _step_seconds(pace)
        if at.kept is not None:
            yield _gauge("last_checkpoint_timestamp_seconds", "When the newest one was made.", at.kept.when)
            yield _gauge("last_checkpoint_epoch", "Epoch in which that was.", at.kept.epoch)
            yield _gauge("last_checkpoint_step", "Step in that epoch, all clients'.", at.kept.step)
        by_client: list[tuple[str, str, str, Callable[[Any], float]]] = [
            ("gauge", "client_connected", "1 where it is there.", lambda look: look.away is None),
            ("gauge", "client_away_seconds", "For how long it has not been there.", lambda look: look.away or 0.0),
            ("gauge", "client_absent", "1 where the run goes on without it.", lambda look: look.given_up),
            ("gauge", "queue_messages", "Messages that came and wait for the server.", lambda look: look.queued),
            ("gauge", "queue_bytes", "Bytes of those.", lambda look: look.queued_bytes),
            ("gauge", "lag_messages", "Received less applied.", lambda look: look.received - look.applied),
            ("gauge", "kept_bytes", "Kept for the client, should it need them again.", lambda look: look.kept_bytes),
            ("counter", "reconnections", "Times that the client came again.", lambda look: look.reconnections),
            ("counter", "rejected_messages", "Messages that could not be used.", lambda look: look.rejected),
            ("counter", "dropped", "Times that the client was dropped for what it did.", lambda look: look.dropped),
        ]  # fmt: skip
        for kind, name, what, value in by_client:
            yield _family(kind, name, what, [((str(look.client),), value(look)) for look in looks], "client")
        applied = [((str(client),), count) for client, count in pace.batches.items()]
        yield _family("counter", "batches_applied", "Batches that were learned from.", applied, "client")
        counted = [
            ((str(look.client), direction, kind), count)
            for look in looks
            for direction, counts in (("up", look.up), ("down", look.down))
            for kind, count in counts.items()
        ]
        yield _family("counter", "bytes", "Bytes of messages.", counted, "client", "direction", "kind")
        refused = [((what,), count) for what, count in ({} if overview.hub is None else overview.hub.refusals).items()]
        yield _family("counter", "refused", "Connections and newcomers that were refused.", refused, "what")


def _step_seconds(pace: Pace) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    total, buckets = 0, []
    for bound, count in zip([*map(str, BOUNDS), "+Inf"], list(pace.steps), strict=True):
        total += count
        buckets.append((bound, total))
    made = HistogramMetricFamily("halfpass_step_seconds", "Time for learning from a batch.")
    made.add_metric((), buckets, pace.seconds)
    return made


class Learner(Protocol):
    """`client_process.ClientRun`."""

    def progress(self) -> tuple[int, int, int, float]:
        """(epoch from 1, its steps done, its samples, its mean loss)"""


class ClientFigures:
    """Of a client."""

    def __init__(self, connection: Connection, run: Learner) -> None:
        self._connection, self._run = connection, run

    def collect(self) -> Iterator[Metric]:
        look, (epoch, step, samples, loss) = self._connection.look(), self._run.progress()
        yield _gauge("epoch", "Epoch that goes on, from 1; 0 before the first.", epoch)
        yield _gauge("epoch_step", "Steps of this epoch that are done.", step)
        yield _gauge("epoch_samples", "Samples of this epoch that were learned from.", samples)
        yield _gauge("training_loss", "Of the auxiliary head, mean of this epoch so far.", loss)
        yield _gauge("spool_bytes", "Kept for the server, should it need them again.", look.spool_bytes)
        yield _gauge("made_messages", "Messages that this client has made: the newest one's place.", look.made)
        yield _gauge("applied_messages", "And up to which the server has worked them off.", look.applied)
        yield _gauge("durable_messages", "And up to which they are in its checkpoint.", look.durable)
        yield _gauge("connected", "1 where the server is there.", look.away is None)
        yield _gauge("away_seconds", "For how long it has not been there.", look.away or 0.0)
        yield _family("counter", "reconnections", "Streams after the first one.", [((), look.reconnections)])
