"""From settings to the cut network: built, given its weights, cut, and tried on a few samples."""

import copy
import dataclasses
import hashlib
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfpass.algorithm.client import unreached_parameters
from halfpass.algorithm.edge import EdgeHalf
from halfpass.arithmetic.precision import Arithmetic, arithmetic
from halfpass.bounded import parse_json
from halfpass.config import ClientsConfig, Config, ModelConfig
from halfpass.cut import CutBatch
from halfpass.data.batches import test_batches
from halfpass.data.datasets import Dataset
from halfpass.errors import InputError, choice_error, reason
from halfpass.networks.heads import HEADS, build_head
from halfpass.networks.models import MIDDLE_CUTS, MODELS, Model, Pair, build_model, check_output
from halfpass.networks.pretrained import digest, freeze, load_weights
from halfpass.networks.replay import CutPlan, Value, plan_as_dict, plan_from_dict
from halfpass.networks.split import Halves, check_same, crossing_values, split, split_by, split_twice
from halfpass.run import children
from halfpass.tasks.table import build_task, check_name
from halfpass.tasks.task import CLASS_NUMBERS, Options, Spec, Task, spec_of
from halfpass.tree import Tree, unflatten
from halfpass.wire.codec import CODECS
from halfpass.wire.messages import write_batch

Plans = dict[str, CutPlan | None]  # by "cut" and "edge_cut"; None where a graph is cut


@dataclass(frozen=True)
class Network:
    """The cut network with its seeded initial weights, on the CPU."""

    halves: Halves
    head: nn.Module | None  # decoupled only
    cut: str
    values: tuple[Value, ...]  # that cross; those of whole batches last
    inputs: Spec  # dtype and shape per sample, by name
    task: Task
    parameters: int  # of the whole network, head not included
    fingerprint: str  # of names and shapes of weights, buffers and cut, and of how it is cut
    plans: Plans
    digests: dict[str, str | None]  # by half: of its weights from model.weights; None where there are none

    def crossing(self, *, test: bool) -> tuple[list[tuple[tuple[int, ...], str]], ...]:
        """Shape and dtype of what crosses: of each sample, and of a batch as a whole."""
        plan = self.plans.get("cut")
        values = self.values if plan is None else plan.of(not test).values
        return tuple([(v.shape, v.dtype) for v in values if v.whole == whole] for whole in (False, True))

    def reads(self, *, test: bool) -> bool:
        """Whether what Python read of data below the cut crosses too."""
        plan = self.plans.get("cut")
        return plan is not None and plan.of(not test).reads

    @property
    def cut_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Per sample, of each value that crosses."""
        return tuple(value.shape for value in self.values)


def agreed_task(config: Config, outputs: int, targets: Spec, names: Sequence[str] = ()) -> Task:
    """The task where the data are elsewhere, and so many outputs and such targets were agreed on."""
    return build_task(config.task.name, outputs, targets, options_of(config, names))


def options_of(config: Config, names: Sequence[str]) -> Options:
    given = config.task
    return Options(
        None, given.loss, given.class_weights, given.positive_weights, given.ignore_index, given.metric,
        config.train.label_smoothing, tuple(names),
    )  # fmt: skip


def build_network(
    config: Config, inputs: Spec | tuple[int, ...], task: Task | int, samples: Any = None, plans: Plans | None = None
) -> Network:
    """Builds and cuts the network; the same settings give the same weights in every process. A number instead of a
    task is that of classes, a shape instead of inputs that of float32 ones.

    How it is cut is found by running it on `samples`, where data are; `plans` are what was found so elsewhere. With
    neither, only what torch.fx can trace is cut.
    """
    check_names(config)
    task = as_task(config, task)
    spec: Spec = {"": ("float32", inputs)} if isinstance(inputs, tuple) else inputs
    sample_shape, example = shapes_of(spec), samples if samples is not None else zeros_of(spec)
    model = build_model(
        config.model.name, sample_shape, task.outputs, config.train.seed, task.shape,
        pretrained=config.model.pretrained, example=example,
    )  # fmt: skip
    loaded = set_up_weights(config, model)
    cut = _cut_name(config, model)
    if config.model.edge_cut is None:
        halves = _cut(model, cut, example, samples, plans, names_of(config.model))
        found: Plans = {"cut": halves.plan}
    else:
        halves, found = _below_edge(config, model, cut, spec, task, samples, plans)
    values = crossing_values(halves, sample_shape, example)
    head = None
    frozen = not any(parameter.requires_grad for parameter in halves.client.parameters())
    if config.method == "decoupled" and config.model.head == NO_HEAD:
        if not frozen:
            expected, remedy = "a head that the client half learns from", "choose one, or freeze all below the cut"
            raise InputError("model.head", expected, NO_HEAD, remedy)
    elif config.method == "decoupled":
        head = build_head(config.model.head, values[0].shape, task.shape, config.train.seed)
        if halves.plan is not None and (tested := halves.plan.evaluation.values[0].shape) != values[0].shape:
            place = f"model.head {config.model.head!r}, in evaluation, where {tested} crosses per sample"
            check_output(place, head, torch.zeros(2, *tested), task.shape)  # of tokens training may drop some
        if halves.plan is None or samples is not None:
            unused = () if halves.plan is None else halves.plan.unused
            _check_reached(config, halves.client, head, example, unused)
    _refuse_parts(config, halves.plan)
    shapes = tuple(value.shape for value in values)
    _check_window(config, shapes, task, halves.client, head)
    _check_budget(config, tuple(value.shape for value in values if not value.whole))
    if config.train.batch_size == 1 and isinstance(example, Tensor):
        _check_single(halves, head, example[:1])
    state = {f"client {n}": v for n, v in halves.client.state_dict().items()}
    state |= {f"server {n}": v for n, v in halves.server.state_dict().items()}
    described = repr([(name, tuple(value.shape)) for name, value in state.items()] + [shapes, task.outputs])
    if any(plan is not None for plan in found.values()):
        described += write_plans(found)
    parameters = sum(p.numel() for half in (halves.client, halves.server) for p in half.parameters())
    fingerprint = hashlib.sha256(described.encode()).hexdigest()[:16]
    digests = {side: digest(loaded, half) for side, half in (("client", halves.client), ("server", halves.server))}
    return Network(halves, head, cut, values, spec, task, parameters, fingerprint, found, digests)


def write_plans(plans: Plans) -> str:
    """JSON, for the server."""
    return json.dumps({key: None if plan is None else plan_as_dict(plan) for key, plan in plans.items()})


def read_plans(text: str) -> Plans:
    """The inverse of `write_plans`; raises InputError where it is none."""
    try:
        plans = parse_json(text or "{}")
        return {str(key): None if plan is None else plan_from_dict(plan) for key, plan in plans.items()}
    except (ValueError, AttributeError) as error:
        remedy = "both sides must run the same halfpass"
        raise InputError("the plan of the cut", "JSON as halfpass writes it", reason(error), remedy) from None


def some_samples(data: Dataset) -> Tree:
    """A few training samples as networks get them, to run the network on before the training."""
    few = data.train.take(torch.arange(TRIED_SAMPLES) % len(data.train))
    inputs, _ = next(iter(test_batches(data, few, TRIED_SAMPLES)))
    return inputs


TRIED_SAMPLES = 4
NO_HEAD = "none"


def _cut(
    model: Model, cut: str, example: Tree, samples: Tree | None, plans: Plans | None, may_cross: Sequence[str]
) -> Halves:
    if isinstance(model, nn.Module) and plans and (plan := plans.get("cut")) is not None:
        return split_by(model, plan)
    if samples is not None and plans is None:
        return split(model, cut, samples, may_cross)
    halves = split(model, cut, may_cross=may_cross if isinstance(model, tuple) else ())
    if isinstance(model, nn.Module) and isinstance(example, Tensor) and example.is_floating_point():
        check_same(f"model.cut {cut!r}", model, halves, tuple(example.shape[1:]))
    return halves


def names_of(model: ModelConfig) -> list[str]:
    """The inputs of `model.may_cross`."""
    return [name.strip() for name in (model.may_cross or "").split(",") if name.strip()]


def set_up_weights(config: Config, model: Model) -> dict[str, Tensor]:
    """Loads initial weights, says what did not match, and freezes what is to be frozen; returns what was loaded."""
    settings = config.model
    whole = Pair(*model) if isinstance(model, tuple) else model
    loaded: dict[str, Tensor] = {}
    if settings.weights is not None:
        loaded, notes = load_weights("model.weights", whole, settings.weights)
        for note in () if children.IS_CHILD else notes:
            print(f"halfpass: {note}", file=sys.stderr, flush=True)
    if settings.freeze is not None:
        freeze("model.freeze", whole, settings.freeze)
    return loaded


def _refuse_parts(config: Config, plan: CutPlan | None) -> None:
    """Raises InputError where a batch would be merged or cut in parts, and something crosses that is of all of it."""
    for name, value, usual in (
        ("train.micro_batch", config.train.micro_batch, None), ("server.merge", config.server.merge, 1),
    ):  # fmt: skip
        if plan is not None and plan.train.whole and value != usual:
            some = "a value crosses that is" if plan.train.whole == 1 else f"{plan.train.whole} values cross that are"
            found = f"{value}, and {some} of the batch as a whole"
            raise InputError(name, f"its default at model.cut {plan.layer}", found, "leave it out, or cut elsewhere")


def _below_edge(
    config: Config, model: Model, cut: str, spec: Spec, task: Task, samples: Tree | None,
    plans: Plans | None,
) -> tuple[Halves, Plans]:
    """The client half, and for a server half the edge's: what is between the cuts, and the head at the upper one."""
    edge_cut = str(config.model.edge_cut)
    given = None
    if plans and plans.get("cut") is not None and plans.get("edge_cut") is not None:
        given = plans["cut"], plans["edge_cut"]
    halves, between, upper = split_twice(
        model, cut, edge_cut, samples if plans is None else None, given,  # type: ignore[arg-type]
        names_of(config.model),
    )  # fmt: skip
    try:
        above = build_network(above_edge(config), spec, task, samples, {"cut": upper})
    except InputError as error:
        place = error.place.replace("model.cut", "model.edge_cut")
        raise InputError(place, error.expected, error.found, error.remedy) from None
    assert above.head is not None
    edge = EdgeHalf(between, above.head, task.probabilities)
    return Halves(halves.client, edge, halves.plan), {"cut": halves.plan, "edge_cut": upper}


def above_edge(config: Config) -> Config:
    """The settings of the link between an edge and the server above: of a run with the edge as its only client."""
    model = dataclasses.replace(config.model, cut=config.model.edge_cut, edge_cut=None)
    wire = dataclasses.replace(config.wire, every=1, budget=None)  # an edge passes on whatever comes
    clients = ClientsConfig(topology="independent", partition="own")
    return dataclasses.replace(config, model=model, clients=clients, wire=wire)


def _cut_name(config: Config, model: Model) -> str:
    if config.model.cut is not None or isinstance(model, tuple):
        return config.model.cut or ""
    if config.model.name not in MIDDLE_CUTS:
        raise InputError(
            "model.cut", f"a layer of {config.model.name}", "none", "halfpass cuts --model.name … lists them"
        )
    return MIDDLE_CUTS[config.model.name]


def _check_reached(
    config: Config, half: nn.Module, head: nn.Module, samples: Tree, unused: Collection[str]
) -> None:
    unreached = unreached_parameters(copy.deepcopy(half).eval(), copy.deepcopy(head).eval(), samples)
    unreached = [name for name in unreached if name not in unused]  # which other samples may reach
    if unreached:
        raise InputError(
            f"model.cut {config.model.cut!r}", "a client half whose every parameter the auxiliary head's loss reaches",
            f"no gradient for {', '.join(unreached[:3])}",
            "cut, or return first, where their values have come together: the head gets the first value that crosses",
        )  # fmt: skip


def _check_window(
    config: Config, shapes: tuple[tuple[int, ...], ...], task: Task, half: nn.Module, head: nn.Module | None
) -> None:
    """The window is also what bounds a message: a batch must fit into it, and the weights that are handed over."""
    beside = 0 if head is None or task.probabilities is None else 2 * task.outputs
    if task.spec != CLASS_NUMBERS:
        beside += 8 * sum(torch.Size(shape).numel() for _, shape in task.spec.values())
    batch_bytes = config.train.at_once * (4 * sum(torch.Size(shape).numel() for shape in shapes) + beside)
    if config.wire.window < batch_bytes:
        raise InputError(
            "wire.window", f"at least {batch_bytes} bytes, one batch at this cut", str(config.wire.window),
            "widen it or choose smaller batches",
        )  # fmt: skip
    tensors = [*half.state_dict().values(), *({} if head is None else head.state_dict()).values()]
    copies = 1 if config.clients.topology == "splitfed" else 2 + (config.train.optimizer == "adamw")
    weight_bytes = copies * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if config.clients.count > 1 and config.clients.topology != "independent" and config.wire.window < weight_bytes:
        raise InputError(
            "wire.window", f"at least {weight_bytes} bytes, the client half that is handed over",
            str(config.wire.window), "widen it or choose an earlier cut",
        )  # fmt: skip


def _check_budget(config: Config, shapes: tuple[tuple[int, ...], ...]) -> None:
    """A budget that no whole batch fits into would train no server half. Of zeros, which no codec makes larger."""
    if config.wire.budget is None:
        return
    size, dtype = config.train.batch_size, torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    tensors = tuple(torch.zeros(size, *shape, dtype=dtype) for shape in shapes)
    batch = CutBatch(0, 0, 0, tensors, torch.zeros(size, dtype=torch.int64))
    batch_bytes = write_batch(batch, config.wire.codec).ByteSize()
    if config.wire.budget < batch_bytes:
        expected = f"at least {batch_bytes} bytes, one batch at this cut"
        raise InputError("wire.budget", expected, str(config.wire.budget), "raise it or choose smaller batches")


def _check_single(halves: Halves, head: nn.Module | None, sample: Tensor) -> None:
    """BatchNorm cannot normalize the values of a single sample by their own statistics."""
    copies = copy.deepcopy((halves, head))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            crossing = copies[0].client.train()(sample)
            copies[0].server.train()(*crossing)
            if copies[1] is not None:
                copies[1].train()(crossing[0])
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            found = "1, and BatchNorm, which needs several values per channel"
            raise InputError("train.batch_size", "at least 2", found, "choose larger batches") from None


def check_names(config: Config) -> None:
    """What can be checked of settings before anything is said of the data."""
    arithmetic_of(config)
    check_name(config.task.name, options_of(config, ()))
    if config.wire.codec not in CODECS:
        raise choice_error("wire.codec", CODECS, config.wire.codec)
    for place, name, table in (("model.name", config.model.name, MODELS), ("model.head", config.model.head, HEADS)):
        if ":" not in name and name not in table:
            if name == NO_HEAD and table is HEADS:
                continue
            raise choice_error(place, [*table, "module:function"], name)


def identity(network: Network) -> dict[str, Any]:
    """What uploads must have in common to be trained on by one server half."""
    return {
        "cut": network.cut, "inputs": written_spec(network.inputs),
        "cut shapes": [list(shape) for shape in network.cut_shapes], "classes": network.task.outputs,
        "network (fingerprint of names and shapes)": network.fingerprint, "plans": write_plans(network.plans),
        **({} if network.task.spec == CLASS_NUMBERS else {"targets": written_spec(network.task.spec)}),
    }  # fmt: skip


def shapes_of(spec: Spec) -> Any:
    """The shapes per sample, nested as the inputs are: as a network's function gets them."""
    return unflatten({name: tuple(shape) for name, (_, shape) in spec.items()})


def zeros_of(spec: Spec, samples: int = 2) -> Any:
    """A batch of zeros of those dtypes and shapes."""
    return unflatten(
        {name: torch.zeros(samples, *shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in spec.items()}
    )


def network_of(config: Config, data: Dataset, task: Task, plans: Plans | None = None) -> Network:
    """The network for that data, cut on a few samples of it, or by plans that were made so before."""
    samples = some_samples(data)
    return build_network(config, spec_of(samples), task, samples, plans)


def written_spec(spec: Spec) -> dict[str, list[Any]]:
    """What inputs or targets are, as JSON has it."""
    return {name: [dtype, list(shape)] for name, (dtype, shape) in spec.items()}


def read_spec(written: dict[str, list[Any]]) -> Spec:
    """The inverse of `written_spec`; raises ValueError, TypeError or AttributeError where it is none."""
    if not all(type(n) is int for _, shape in written.values() for n in shape):
        raise ValueError("a shape that is no list of whole numbers")
    return {name: (dtype, tuple(shape)) for name, (dtype, shape) in written.items()}


def arithmetic_of(config: Config) -> Arithmetic:
    return arithmetic(config.train.device, config.train.precision, config.train.compile)


def as_task(config: Config, task: Task | int) -> Task:
    return agreed_task(config, task, CLASS_NUMBERS) if isinstance(task, int) else task
