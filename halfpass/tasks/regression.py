"""Numbers for each sample: floating point (N,) or (N, columns), NaN where one is not known. Mean squared, absolute or
Huber error; R²."""

from collections.abc import Sequence

from torch import Tensor

from halfpass.errors import InputError, choice_error
from halfpass.tasks.losses import Distance
from halfpass.tasks.task import Options, Spec, Task, of_torchmetrics, one_tensor, weights
from halfpass.tree import Tree

EXPECTED = "floating point (N,) or (N, columns)"


def count(place: str, splits: Sequence[Tree], options: Options) -> int:
    """How many columns there are; raises InputError where the targets are none."""
    tensors = [one_tensor(place, split, EXPECTED) for split in splits]
    for part, tensor in zip(("train", "test"), tensors, strict=False):
        if not tensor.is_floating_point() or tensor.ndim not in (1, 2):
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise InputError(place, EXPECTED, found, "convert them with .float(), or choose another task")
        _check(f"{place}, {part}", tensor)
    return 1 if tensors[0].ndim == 1 else tensors[0].shape[1]


def _check(place: str, targets: Tensor) -> None:
    if targets.isinf().any():
        sample = int(targets.isinf().nonzero()[0][0])
        raise InputError(f"{place}, sample {sample}", "a number, or NaN where it is not known", "infinity", "mend it")


def build(outputs: int, targets: Spec, options: Options) -> Task:
    name = options.loss or "mse"
    if name not in Distance.FUNCTIONS:
        raise choice_error("task.loss", Distance.FUNCTIONS, name)

    def measured(answers: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        return answers, found.to(answers.dtype).reshape(answers.shape)

    return Task(
        "regression", outputs, Distance(name, weights("task.class_weights", options.class_weights, outputs)),
        of_torchmetrics("regression"), "r2", measured=measured, check=_check,
    )  # fmt: skip
