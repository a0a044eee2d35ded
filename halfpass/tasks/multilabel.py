"""Several labels, each there or not, for each sample: (N, labels) of 0, 1 and, where one is not known, NaN. Binary
cross entropy; area under the ROC curve of each label."""

from collections.abc import Sequence

import torch
from torch import Tensor

from halfpass.errors import InputError
from halfpass.tasks.losses import BinaryCrossEntropy
from halfpass.tasks.task import Options, Spec, Task, of_torchmetrics, one_tensor, weights
from halfpass.tree import Tree

EXPECTED = "labels (N, labels) of 0, 1 and, where unknown, NaN"


def count(place: str, splits: Sequence[Tree], options: Options) -> int:
    """How many labels there are; raises InputError where the targets are none."""
    tensors = [one_tensor(place, split, EXPECTED) for split in splits]
    for part, tensor in zip(("train", "test"), tensors, strict=False):
        if tensor.ndim != 2:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise InputError(place, EXPECTED, found, "give a column for each label")
        _check(f"{place}, {part}", tensor)
    return tensors[0].shape[1]


def _check(place: str, targets: Tensor) -> None:
    outside = ~((targets == 0) | (targets == 1) | (targets != targets))
    if outside.any():
        sample, label = outside.nonzero()[0].tolist()
        remedy = "write 0 or 1, or NaN where it is not known"
        found = f"{targets[sample, label]:g}"
        raise InputError(f"{place}, sample {sample}, label {label}", "0, 1 or NaN", found, remedy)


def build(outputs: int, targets: Spec, options: Options) -> Task:
    loss = BinaryCrossEntropy(
        weights("task.class_weights", options.class_weights, outputs),
        weights("task.positive_weights", options.positive_weights, outputs), options.label_smoothing,
    )  # fmt: skip
    return Task(
        "multilabel", outputs, loss, of_torchmetrics("multilabel"), "auroc_macro",
        probabilities=torch.sigmoid, measured=lambda answers, found: (answers, found.float()), check=_check,
    )  # fmt: skip
