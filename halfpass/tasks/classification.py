"""One class of several for each sample: int64 (N,). Cross entropy, accuracy."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from halfpass.errors import InputError
from halfpass.tasks.losses import CrossEntropy
from halfpass.tasks.task import Options, Spec, Task, check_classes, count_classes, of_torchmetrics, one_tensor, weights
from halfpass.tree import Tree

EXPECTED = "class numbers, int64 (N,)"


def count(place: str, splits: Sequence[Tree], options: Options) -> int:
    """How many classes there are; raises InputError where the targets are none."""
    return count_classes(place, [_numbers(place, split) for split in splits], options, options.ignore_index)


def _numbers(place: str, targets: Tree) -> Tensor:
    tensor = one_tensor(place, targets, EXPECTED)
    if tensor.dtype != torch.int64 or tensor.ndim != 1:
        flat = tensor.ndim == 1
        remedy = "convert them with .long()" if flat else "choose another task: multilabel, regression, tokens"
        if flat and tensor.is_floating_point():
            remedy = "choose another task, such as regression; a table's are classes by data.target_kind classes"
        raise InputError(place, EXPECTED, f"{tensor.dtype} {tuple(tensor.shape)}", remedy)
    return tensor


def build(outputs: int, targets: Spec, options: Options) -> Task:
    ignored = options.ignore_index
    weight = weights("task.class_weights", options.class_weights, outputs)

    return Task(
        "classification", outputs, CrossEntropy(weight, ignored, options.label_smoothing),
        of_torchmetrics("classification", outputs, ignored), "accuracy",
        probabilities=partial(torch.softmax, dim=1),
        check=lambda place, found: check_classes(place, found, outputs, ignored),
    )  # fmt: skip
