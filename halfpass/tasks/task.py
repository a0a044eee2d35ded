"""Task: the loss, the outputs and the metrics of what is learned, in one value. `tasks.py` has the table of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfpass.errors import InputError
from halfpass.tree import Tree, flatten, leaves

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

Spec = Mapping[str, tuple[str, tuple[int, ...]]]  # of targets: by name, dtype and shape per sample
CLASS_NUMBERS: Spec = {"": ("int64", ())}


@dataclass(frozen=True)
class Options:
    """What a task's loss and metrics are made of; None is the task's own default."""

    outputs: int | None = None
    loss: str | None = None
    class_weights: Sequence[float] | None = None
    positive_weights: Sequence[float] | None = None
    ignore_index: int | None = None
    metric: str | None = None
    label_smoothing: float = 0.0
    names: Sequence[str] = ()  # of classes, labels or target columns, where they are known


def unchanged(answers: Tensor, targets: Tree) -> tuple[Tensor, Tree]:
    return answers, targets


@dataclass(frozen=True)
class Task:
    """What both halves, the heads and the tests agree on. `loss` and what it holds belong to no side: each has a copy.

    `metrics` makes a fresh torchmetrics collection; `lead` is the one of them that tables, curves and reports lead
    with. `unit` is "%" where that is from 0 to 1. `measured` makes of answers and targets what the metrics take.
    """

    name: str
    outputs: int
    loss: Callable[[Tensor, Any], Tensor]  # of outputs (B, *output_shape) and targets: their mean, or one per sample
    metrics: "Callable[[], MetricCollection]"
    lead: str
    higher_is_better: bool = True
    unit: str = ""
    output_shape: tuple[int, ...] = ()  # per sample; () is (outputs,)
    probabilities: Callable[[Tensor], Tensor] | None = None  # outputs → what is measured, and a head sends up in tests;
    # None: the outputs themselves are measured, and a head sends nothing
    measured: Callable[[Tensor, Any], tuple[Any, Any]] = unchanged
    targets: Spec | None = None  # None: class numbers
    names: tuple[str, ...] = ()
    check: Callable[[str, Any], None] | None = None  # place and targets; raises InputError for a value out of range

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample's outputs."""
        return self.output_shape or (self.outputs,)

    @property
    def spec(self) -> Spec:
        """Of the targets."""
        return CLASS_NUMBERS if self.targets is None else self.targets

    def add(self, collection: "MetricCollection", outputs: Tensor, targets: Tree) -> None:
        """Adds a test batch's outputs to a collection of `metrics`."""
        self.add_answers(collection, outputs if self.probabilities is None else self.probabilities(outputs), targets)

    def add_answers(self, collection: "MetricCollection", answers: Tensor, targets: Tree) -> None:
        """Adds a test batch's answers, as `probabilities` makes them."""
        collection.update(*self.measured(answers, targets))

    def values(self, collection: "MetricCollection") -> dict[str, float]:
        """The metrics by name; one that has a value for each class or column by `METRIC/NAME`."""
        values: dict[str, float] = {}
        for part in collection.modules():  # beside other ranks of torchrun's each would wait for theirs
            if hasattr(part, "distributed_available_fn"):
                setattr(part, "distributed_available_fn", _alone)  # noqa: B010  # which mypy takes for a module
        for name, value in collection.compute().items():
            each = value.tolist()
            if isinstance(each, list):
                known = self.names if len(self.names) == len(each) else tuple(map(str, range(len(each))))
                values |= {f"{name}/{key}": number for key, number in zip(known, each, strict=True)}
            else:
                values[name] = float(each)
        return values


def _alone() -> bool:
    return False


def of_torchmetrics(name: str, *arguments: Any) -> "Callable[[], MetricCollection]":
    """Makes a collection of `metrics.py`, which is imported only then."""

    def make() -> "MetricCollection":
        from halfpass.tasks import metrics

        made: MetricCollection = getattr(metrics, name)(*arguments)
        return made

    return make


def spec_of(targets: Tree) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape per sample of each tensor of targets, by name."""
    return {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape[1:]))
        for name, tensor in flatten(targets).items()
    }


def one_tensor(place: str, targets: Tree, expected: str) -> Tensor:
    """The targets of a task that has one tensor of them."""
    if not isinstance(targets, Tensor):
        found = f"{len(leaves(targets))} tensors"
        raise InputError(place, expected, found, "return one tensor, or give a task of your own as module:function")
    return targets


def check_classes(place: str, targets: Tensor, outputs: int, ignore_index: int | None) -> None:
    """Raises InputError that names a class number which is none."""
    outside = (targets < 0) | (targets >= outputs)
    if ignore_index is not None:
        outside &= targets != ignore_index
    if outside.any():
        at = outside.nonzero()[0].tolist()
        found = int(targets[tuple(at)])
        remedy = "number the classes from 0" if found >= 0 else "set task.ignore_index to what marks the unlabelled"
        raise InputError(f"{place}, sample {at[0]}", f"a class in 0..{outputs - 1}", str(found), remedy)


def count_classes(
    place: str, splits: Sequence[Tensor], options: Options, ignore_index: int | None
) -> int:
    """How many classes there are, as is said, or else as the targets tell; checks them all."""
    seen = 1 + max((int(_labelled(split, ignore_index).max(initial=-1)) for split in splits), default=-1)
    outputs = options.outputs or len(options.names) or seen
    for part, split in zip(("train", "test"), splits, strict=False):
        check_classes(f"{place}, {part}", split, outputs, ignore_index)
    if outputs < 1:
        raise InputError(place, "at least one class", "none", "label some samples, or set data.classes")
    return outputs


def _labelled(targets: Tensor, ignore_index: int | None) -> Any:
    flat = targets.flatten()
    return (flat if ignore_index is None else flat[flat != ignore_index]).cpu().numpy()


def weights(place: str, values: Sequence[float] | None, outputs: int) -> Tensor | None:
    """A tensor of one weight for each output."""
    if values is None:
        return None
    if len(values) != outputs:
        raise InputError(place, f"{outputs} weights, one for each output", f"{len(values)}", "give them all")
    return torch.tensor(values, dtype=torch.float32)
