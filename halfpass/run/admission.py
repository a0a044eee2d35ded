"""Who may join a run: newcomers say what they have, and must agree with the server and with each other."""

import math
from collections.abc import Mapping
from typing import Any

from halfpass.bounded import parse_json
from halfpass.config import Config
from halfpass.cut import CutBatch
from halfpass.data.batches import batch_count
from halfpass.errors import InputError
from halfpass.run import setup
from halfpass.run.network import Network, agreed_task, build_network, read_plans, read_spec
from halfpass.tasks.task import CLASS_NUMBERS, Spec
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.messages import DTYPES, PROTOCOL, check_batch

MOST_SETTINGS_BYTES = 2**16  # in JSON, of a newcomer
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
        if (before := self.joins.get(join.client)) is not None:
            remedy = "give it the data with which it began"
            for what, expected, found in (
                ("samples", before.samples, join.samples), ("steps per epoch", before.steps, join.steps)
            ):  # fmt: skip
                _agree(place, what, expected, found, remedy)
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
