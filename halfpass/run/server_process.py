"""The server process: takes cut batches from its clients in order, trains the server half, and writes the run folder.

It needs no data: sample shape and number of classes come with the first client that joins.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from halfpass.bounded import parse_json
from halfpass.config import Config
from halfpass.cut import CutBatch
from halfpass.data.batches import batch_count
from halfpass.errors import InputError, RunError
from halfpass.files import alone_in
from halfpass.run import setup
from halfpass.run.above import Above
from halfpass.run.children import IS_CHILD, for_peer
from halfpass.run.credentials import EDGE, SERVER, trust_of
from halfpass.run.edge import RemoteLink
from halfpass.run.epoch import HandedOver, Score, Tally, Values
from halfpass.run.epochs import run_epochs
from halfpass.run.network import Network, above_edge, agreed_task, build_network, read_plans, read_spec
from halfpass.run.records import RunFolder, Wires, refuse_run, result
from halfpass.run.replay import Lessons
from halfpass.run.rounds import Handover, in_turn, schedule_position, testers, turns
from halfpass.tasks.task import CLASS_NUMBERS, Spec
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.hub import Hub, Received
from halfpass.wire.messages import (
    DTYPES,
    PROTOCOL,
    check_batch,
    write_gradients,
    write_weights,
)
from halfpass.wire.meter import Meter
from halfpass.wire.store import UploadStore

JOIN_SECONDS = 600.0  # for all clients to be started, perhaps by hand
MOST_SETTINGS_BYTES = 2**16  # in JSON, of a newcomer
LONGEST_EPOCH = 1e9  # seconds that a client may say it was busy
MOST_VALUES, MOST_CLASSES = 2**24, 2**20  # per sample: what a newcomer may make the server build for


class Admission:
    """Checks newcomers. The first one's sample shape and classes settle the network; the others must agree."""

    def __init__(self, config: Config, *, of_edge: bool = False) -> None:
        """`of_edge`: the newcomer is an edge, whose steps are those of its clients."""
        self.config, self.of_edge = config, of_edge
        self.joins: dict[int, pb.Join] = {}
        self.network: Network | None = None  # only once a client has been admitted
        self._data: dict[str, Any] | None = None  # what the first one says of its data

    def admit(self, join: pb.Join) -> None:
        """Raises InputError, both values in it, where a client differs from the server or from an earlier client."""
        place = f"client {join.client} at joining"
        _agree(place, "protocol", PROTOCOL, join.protocol)
        theirs, ours = _settings(place, join), setup.agreed_settings(self.config)
        data = theirs.pop("data", {})  # what the clients' data must have in common; the server has none
        weights = theirs.pop("weights", {})
        for key in sorted(ours.keys() | theirs.keys()):
            _agree(place, key, ours.get(key), theirs.get(key))
        _check_sizes(place, join, self.config.train.batch_size, self.of_edge)
        first = next(iter(self.joins.values()), join)
        inputs = read_inputs(place, join)
        _agree(place, "inputs", read_inputs(place, first), inputs)
        self._agree_on_data(place, data)
        _agree(place, "number of classes", first.outputs, join.outputs, setup.CLASSES_REMEDY)
        spec, names = _targets(place, join)
        _agree(place, "targets", _targets(place, first)[0], spec)
        network = self.network
        if network is None:
            task, plans = agreed_task(self.config, join.outputs, spec, names), read_plans(join.plan)
            network = build_network(self.config, inputs, task, plans=plans)
        _agree_on_weights(place, network.digests, weights if isinstance(weights, dict) else {})
        _agree(place, "parameters of the network", network.parameters, join.parameters)
        _agree(place, "network (fingerprint of names and shapes)", network.fingerprint, join.fingerprint)
        self.network, self.joins[join.client] = network, join
        self._data = data if self._data is None else self._data

    def _agree_on_data(self, place: str, data: object) -> None:
        if not isinstance(data, dict):
            raise InputError(place, "what its data hold, by name", type(data).__name__, "use halfpass join")
        setup.check_agreement(place, data if self._data is None else self._data, data)

    def check(self, client: int, batch: pb.Batch) -> None:
        """Raises InputError where a batch does not fit the cut."""
        assert self.network is not None
        task = self.network.task
        with_answers = batch.test and self.network.head is not None and task.probabilities is not None
        size = self.config.train.batch_size
        crossing, whole = self.network.crossing(test=batch.test)
        check_batch(
            batch, client, crossing, task.outputs, size, with_answers, task.spec, whole,
            self.network.reads(test=batch.test), self.config.wire.codec,
        )  # fmt: skip

    def check_values(self, client: int, batch: CutBatch) -> None:
        """Raises InputError where a batch's targets, once decoded, are out of range."""
        assert self.network is not None
        if self.network.task.check is not None:
            place = f"batch of client {client}, epoch {batch.epoch}, step {batch.step}, targets"
            self.network.task.check(place, batch.targets)


def _agree_on_weights(place: str, ours: Mapping[str, str | None], theirs: Mapping[str, Any]) -> None:
    """Each half begins with its owner's weights; where the other side has loaded some for it, they must be those."""
    remedy = "give both sides the same file as model.weights, or each one that holds its own half alone"
    if theirs.get("server") not in (None, ours.get("server")):
        found = f"{theirs['server']!r} loaded at the client"
        expected = f"initial weights of the server half {ours.get('server')!r} (the server's)"
        raise InputError(place, expected, found, remedy)
    if ours.get("client") not in (None, theirs.get("client")):
        expected = f"initial weights of the client half {ours['client']!r}, loaded at the server"
        raise InputError(place, expected, f"{theirs.get('client')!r} at the client", remedy)


def read_inputs(place: str, join: pb.Join) -> Spec:
    """What a client says of its inputs: dtypes and shapes by name."""
    try:
        spec = read_spec(parse_json(join.inputs, MOST_SETTINGS_BYTES))
        known = all(dtype in DTYPES and all(type(n) is int for n in shape) for dtype, shape in spec.values())
    except (ValueError, TypeError, AttributeError):
        known, spec = False, {}
    if not spec or not known:
        expected = "inputs as a JSON object of names, dtypes and shapes"
        raise InputError(place, expected, repr(join.inputs[:40]), "use halfpass join")
    return spec


def _targets(place: str, join: pb.Join) -> tuple[Spec, list[str]]:
    """What a client says of its targets: dtypes and shapes, and the names of classes or columns."""
    if not join.targets:
        return CLASS_NUMBERS, []
    expected = "targets as a JSON object of names, dtypes and shapes"
    try:
        said = parse_json(join.targets, MOST_SETTINGS_BYTES)
        spec, names = read_spec(said["spec"]), list(map(str, said["names"]))
        sizes = [math.prod(shape) for _, shape in spec.values()]
        known = all(dtype in DTYPES for dtype, _ in spec.values()) and all(n >= 0 for _, s in spec.values() for n in s)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(place, expected, repr(join.targets[:40]), "use halfpass join") from None
    if not spec or not known or sum(sizes) > MOST_VALUES:
        raise InputError(place, f"targets of at most {MOST_VALUES} values", str(spec)[:80], "check the data set")
    return spec, names


def _settings(place: str, join: pb.Join) -> dict[str, Any]:
    try:
        settings = parse_json(join.settings, MOST_SETTINGS_BYTES)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise InputError(place, "settings as a JSON object", repr(join.settings[:40]), "use halfpass join")
    return settings


def _check_sizes(place: str, join: pb.Join, batch_size: int, of_edge: bool) -> None:
    """What a client says of its data, before anything of that size is built."""
    shapes = [shape for _, shape in read_inputs(place, join).values()]
    if not (all(n > 0 for shape in shapes for n in shape) and 0 < sum(map(math.prod, shapes)) <= MOST_VALUES
            and all(shapes) and 0 < join.outputs <= MOST_CLASSES):  # fmt: skip
        raise InputError(
            place, f"samples of 1 to {MOST_VALUES} values in 1 to {MOST_CLASSES} classes",
            f"shape {shapes[0] if len(shapes) == 1 else shapes} in {join.outputs} classes", "check the data set",
        )  # fmt: skip
    if join.samples < 1:
        raise InputError(place, "training samples", "none", "check the data set")
    steps = batch_count(join.samples, batch_size)
    # Each of an edge's clients may have a smaller last batch, and leaves out a single last sample.
    least, most = (1, join.samples) if of_edge else (steps, steps)
    if not least <= join.steps <= most:
        expected = f"{least}" if most == least else f"{least} to {most}"
        found, remedy = f"{join.steps}", "start both sides with the same configuration"
        raise InputError(place, f"{expected} steps per epoch for {join.samples} samples", found, remedy)


def _agree(
    place: str, what: str, expected: object, found: object, remedy: str = "start both sides with the same configuration"
) -> None:
    if expected != found:
        raise InputError(place, f"{what} {expected!r} (the server's)", f"{found!r}", remedy)


class ServerRun:
    """The server's side of a run; the same steps as `local.LocalRun`, with the clients at the end of a wire."""

    def __init__(
        self, config: Config, hub: Hub, admission: Admission, store: UploadStore | None,
        link: Callable[..., RemoteLink] | None,
    ) -> None:  # fmt: skip
        """`link` makes the one to the server above an edge."""
        assert admission.network is not None
        self.config, self.hub, self.network, self.task = config, hub, admission.network, admission.network.task
        self.server = setup.build_server(config, self.network)
        joins = [admission.joins[k] for k in range(config.clients.count)]
        self.above = Above() if link is None else link(config, self.server, joins, self.task)
        self.steps = [join.steps for join in joins]
        setup.check_rounds(config, self.steps)
        self.handover = Handover(config.clients.topology, config.clients.count)
        self.has_trained = False
        self.lessons = Lessons(config, self.server, self.steps, store, self.above)
        self._taken: list[tuple[int, CutBatch]] = []  # by client, since the last step
        self._handed_over = HandedOver(config, setup.build_client(config, self.network, 0))
        # An edge learns from its uploads as often as its own replay says.
        self._most_samples = [2**48 if admission.of_edge else join.samples for join in joins]
        # (epoch, step, samples of its batch so far, samples missing) after each client's last message
        self._last = dict.fromkeys(range(len(joins)), (-1, -1, 0, 0))
        self._evaluation_sockets = [(0, 0)] * len(joins)  # (up, down) so far, to be left out

    def train(self, epoch: int, after_step: Callable[[], None]) -> tuple[dict[int, Tally], Tally]:
        self.lessons.after_step = after_step
        self.above.begin(epoch)
        clients: dict[int, Tally] = {}
        server = Tally(self.server.arithmetic.device)
        schedule = turns(self.config.clients.topology, self.steps, self.config.clients.rounds)
        ahead = iter(schedule)  # for the clients, whose next turn waits for no batch that the server has to learn from
        current = self._begin(epoch, ahead)
        self.has_trained = True  # a client has, at the least
        for turn in schedule:
            for k, received in self._until_ended(turn):
                if received.batch is not None:
                    self._step(k, epoch, received, server)
                while current and (ends := self.hub.take_ends(current)) is not None:
                    clients |= self._hand_over(epoch, ends)
                    current = self._begin(epoch, ahead)
        self.lessons.end_epoch(epoch, server)
        return clients, server

    def _until_ended(self, turn: Collection[int]) -> Iterator[tuple[int, Received]]:
        """Batches of all clients of the turn, round and round or as they arrive, until each has ended its epoch
        or round. The micro-batches of one batch come one behind the other."""
        active = set(turn)
        circle = in_turn(turn, active)
        while active:
            candidates = [next(circle)] if self.config.wire.order == "round-robin" else active
            k, received = self.hub.take(candidates, "batch", "epoch_end")
            while received.batch is not None and not received.batch.last:
                yield k, received
                _, received = self.hub.take([k], "batch")
            if received.batch is None:
                active.remove(k)
            yield k, received

    def _step(self, k: int, epoch: int, received: Received, served: Tally) -> None:
        batch = received.batch
        assert batch is not None
        self._check_order(k, batch, received.test, epoch)
        gradients = self.lessons.learn(batch, received.upload, served)
        if gradients is None:
            self.hub.send(k, _ack(batch))
        else:
            self.hub.send(k, write_gradients(batch, gradients, self.config.wire.codec))
        self._taken.append((k, batch))
        if not self.lessons.holds:
            for owner, done in self._taken:
                self.hub.give_back(owner, done)
            self._taken = []

    def _begin(self, epoch: int, ahead: Iterator[dict[int, int]]) -> dict[int, int]:
        """The clients of the next turn may go on; returns that turn, empty where there is no more."""
        turn = next(ahead, {})
        for k, until in turn.items():
            first, total = schedule_position(
                self.config.clients.topology, self.steps, k, epoch, self.config.train.epochs
            )
            begin = pb.Begin(
                epoch=epoch, first_step=first, total_steps=total, until=until, return_weights=self.handover.needed,
                weights=write_weights(self.handover.give(k)),
            )  # fmt: skip
            self.hub.send(k, pb.ServerMessage(begin=begin))
        return turn

    def _check_order(self, k: int, batch: CutBatch, test: bool, epoch: int) -> None:
        """Batches come in their order; which of them come is the client's choice, but each comes whole."""
        *last, done, missing = self._last[k]
        place = [batch.epoch, batch.step]
        follows = place > last and batch.before == 0
        if missing:
            follows = place == last and (batch.before, len(batch) + batch.after) == (done, missing)
        if test or batch.epoch != epoch or batch.step >= self.steps[k] or not follows:
            raise RunError(
                f"client {k}", f"a batch of epoch {epoch} after step {last[1]}, of {self.steps[k]} steps"
                + (f", or {missing} more samples of that one" if missing else ""),
                f"epoch {batch.epoch}, step {batch.step} from sample {batch.before}, test {test}",
                "both sides must run the same halfpass",
            )  # fmt: skip
        self._last[k] = (batch.epoch, batch.step, batch.before + len(batch), batch.after)

    def _hand_over(self, epoch: int, ends: dict[int, pb.EpochEnd]) -> dict[int, Tally]:
        """Takes what the clients of a turn gave back at its end; returns what they say of their epochs so far."""
        weights = {k: self._handed_over.read(f"client {k}", end.weights, "lower train.lr") for k, end in ends.items()}
        for k, end in ends.items():
            sound = (
                end.epoch == epoch and 0 <= end.busy_seconds < LONGEST_EPOCH and math.isfinite(end.learning_rate)
                and end.samples <= self._most_samples[k] and end.uploads + end.withheld <= self.steps[k]
            )  # fmt: skip
            if not sound:
                raise RunError(f"client {k}", f"a sound end of epoch {epoch}", f"one of epoch {end.epoch}", "see there")
        self.handover.take(weights)
        return {k: self._client_tally(k, end) for k, end in ends.items()}

    def _client_tally(self, k: int, end: pb.EpochEnd) -> Tally:
        """What the client says of its epoch."""
        return Tally(
            self.server.arithmetic.device, loss_sum=end.loss * end.samples, samples=end.samples, steps=self.steps[k],
            busy_seconds=end.busy_seconds, learning_rate=end.learning_rate, peak_memory_bytes=end.peak_memory_bytes,
            uploads=end.uploads, withheld=end.withheld,
        )  # fmt: skip

    def test(self, epoch: int) -> tuple[Score, dict[int, Values]]:
        """(the test's score, the auxiliary head's by client), by the same way as training, codec included."""
        own_data = self.config.clients.partition == "own"
        clients = testers(self.config.clients.topology, len(self.steps), own_data=own_data)
        score, auxiliary = Score(self.task, clients), dict[int, Values]()
        self.above.begin_test(epoch)
        self.server.half.eval()
        for k in clients:
            before = self.hub.socket_traffic(k)
            weights = write_weights(self.handover.give(k))
            self.hub.send(k, pb.ServerMessage(test=pb.Test(epoch=epoch, weights=weights)))
            count, end = self._test_client(k, epoch, score)
            if (end.samples, end.epoch) != (count, epoch):
                raise RunError(f"client {k}", f"the end of a test of {count} samples", str(end.samples), "see there")
            if end.has_head:
                auxiliary[k] = self._auxiliary(k, end, score)
            self._leave_out(k, before, sum(tensor.ByteSize() for tensor in weights))
        self.server.half.train()
        self.above.end_test(epoch, score)
        return score, auxiliary

    def _auxiliary(self, k: int, end: pb.TestEnd, score: Score) -> Values:
        """What the client says of its head: the metrics that the server half has, and no infinity."""
        values = {said.metric: said.value for said in end.scores}
        expected = score.values().keys()
        if values.keys() != expected or len(end.scores) != len(values) or any(map(math.isinf, values.values())):
            found = ", ".join(sorted(values))[:200] or "none"
            raise RunError(f"client {k}", f"scores of its head ({', '.join(expected)})", found, "see there")
        return values

    def _test_client(self, k: int, epoch: int, score: Score) -> tuple[int, pb.TestEnd]:
        """Adds the client's test to the score; (its samples, what it says at the end)."""
        samples, step = 0, 0
        while True:
            _, received = self.hub.take([k], "batch", "test_end")
            if received.message is not None:
                if samples == 0:
                    raise RunError(f"client {k}", "a test set", "none", "see there")
                return samples, received.message.test_end
            assert received.batch is not None
            batch = received.batch
            _in_sequence(k, (epoch, step, True), (batch.epoch, batch.step, received.test))
            self.lessons.test(batch, received.upload, score)
            self.hub.send(k, _ack(batch))
            self.hub.give_back(k, batch)
            samples, step = samples + len(batch), step + 1

    def _leave_out(self, k: int, before: tuple[int, int] | None, weights: int) -> None:
        """Evaluation's bytes at the socket are not training's; weights that were handed over with it are."""
        after = self.hub.socket_traffic(k)
        if before is not None and after is not None:
            up, down = self._evaluation_sockets[k]
            self._evaluation_sockets[k] = (up + after[0] - before[0], down + after[1] - before[1] - weights)

    def state(self) -> None:
        """Clients would have to go on with it from the same step."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def meters(self) -> dict[int, Meter]:
        return {k: self.hub.meter(k) for k in range(len(self.steps))}

    def sockets(self) -> dict[int, tuple[int, int] | None]:
        """(up, down) bytes at each client's socket so far, evaluation left out; None where the system does not say."""
        return {k: self._socket(k) for k in range(len(self.steps))}

    def _socket(self, k: int) -> tuple[int, int] | None:
        traffic, (up, down) = self.hub.socket_traffic(k), self._evaluation_sockets[k]
        return None if traffic is None else (traffic[0] - up, traffic[1] - down)

    def finish(self) -> Wires:
        """Gives every client the final client half, where it is shared, and lets it go; returns all bytes."""
        for k in range(len(self.steps)):
            finish = pb.Finish(weights=write_weights(self.handover.give(k)))
            self.hub.send(k, pb.ServerMessage(finish=finish))
        for k in range(len(self.steps)):
            self.hub.take([k], "finished")
        self.above.finish()
        meters = list(self.meters().values())
        known = [traffic for traffic in self.sockets().values() if traffic is not None]
        for k in range(len(self.steps)):
            self.hub.release(k)
        if len(known) < len(self.steps):
            return Wires(meters, None)
        return Wires(meters, (sum(up for up, _ in known), sum(down for _, down in known)))


def _ack(batch: CutBatch) -> pb.ServerMessage:
    return pb.ServerMessage(ack=pb.Ack(epoch=batch.epoch, step=batch.step, before=batch.before))


def _in_sequence(client: int, expected: tuple[int, int, bool], found: tuple[int, int, bool]) -> None:
    if expected != found:
        raise RunError(
            f"client {client}", "epoch {}, step {}, test {}".format(*expected),
            "epoch {}, step {}, test {}".format(*found), "both sides must run the same halfpass",
        )  # fmt: skip


def serve(
    config: Config, bind: str, announce: Callable[[int], None], above: str | None = None, *, insecure: bool = False
) -> dict[str, Any]:
    """Serves one run from joining to the written run folder; returns what `result.json` holds. `insecure` has it listen
    to other machines without TLS.

    `announce(port)` is called once clients can join. Where the run has an edge, the server with an address `above` it
    is that edge, and the one without is the server at the top.
    """
    out = config.folder
    if above is not None and config.model.edge_cut is None:
        raise InputError("--above", "a run with model.edge_cut", "none", "give both, or neither")
    given, of_edge = config, above is None and config.model.edge_cut is not None
    if of_edge:
        config = above_edge(config)
    refuse_run(out)
    setup.check_between_processes(config)
    trust = trust_of(config.tls, SERVER if above is None else EDGE)
    setup.settle_process(config)
    admission = Admission(config, of_edge=of_edge)
    hub = Hub(
        bind, clients=config.clients.count, window_bytes=config.wire.window, timeout=config.wire.timeout,
        admit=admission.admit, check=admission.check,
        check_values=admission.check_values, keep_uploads=setup.keeps_uploads(config), trust=trust, insecure=insecure,
        of_edge=of_edge,
    )  # fmt: skip
    try:
        announce(hub.port)
        hub.wait_for_clients(JOIN_SECONDS)
        assert admission.network is not None
        with setup.open_store(config, admission.network) as store:
            link = None
            if above is not None:
                link = partial(RemoteLink, address=above, trust=trust, insecure=insecure)
            run = ServerRun(config, hub, admission, store, link)
            with nullcontext() if IS_CHILD else alone_in(out):  # else its parent is
                return _run(config, RunFolder.create(out, given), run)
    except BaseException as error:
        hub.fail(*for_peer("server", error))
        raise
    finally:
        hub.stop()


def _run(config: Config, folder: RunFolder, run: ServerRun) -> dict[str, Any]:
    try:
        rows = run_epochs(config, run, folder)
        wires = run.finish()
    except BaseException as error:
        run.above.fail(*for_peer("edge", error))
        raise
    finally:  # what was trained is kept, whatever happened
        if run.has_trained:
            folder.save_server(run.server, config)
    return folder.finish(result(config, run.task, run.network.cut, rows, wires, folder.environment))
