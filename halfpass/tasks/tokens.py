"""A class for each token: int64 (N, T), -100 where there is none. Cross entropy; accuracy, perplexity."""

from collections.abc import Sequence

import torch

from halfpass.errors import InputError
from halfpass.tasks.losses import NEVER, CrossEntropy
from halfpass.tasks.task import Options, Spec, Task, check_classes, count_classes, of_torchmetrics, one_tensor, weights
from halfpass.tree import Tree

EXPECTED = "a class for each token, int64 (N, T)"


def count(place: str, splits: Sequence[Tree], options: Options) -> int:
    """How many classes there are; raises InputError where the targets are none."""
    tokens = [one_tensor(place, split, EXPECTED) for split in splits]
    for each in tokens:
        if each.dtype != torch.int64 or each.ndim != 2:
            raise InputError(place, EXPECTED, f"{each.dtype} {tuple(each.shape)}", "give class numbers, with .long()")
    return count_classes(place, tokens, options, _ignored(options))


def _ignored(options: Options) -> int:
    return NEVER if options.ignore_index is None else options.ignore_index


def build(outputs: int, targets: Spec, options: Options) -> Task:
    ignored = _ignored(options)
    weight = weights("task.class_weights", options.class_weights, outputs)
    ((_, length),) = targets.values()
    return Task(
        "tokens", outputs, CrossEntropy(weight, ignored, options.label_smoothing, classes_last=True),
        of_torchmetrics("tokens", outputs, ignored), "accuracy", output_shape=(*length, outputs),
        check=lambda place, found: check_classes(place, found, outputs, ignored),
    )  # fmt: skip
