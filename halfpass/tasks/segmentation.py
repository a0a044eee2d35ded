"""A class for each pixel: whole numbers (N, H, W). Cross entropy, mean intersection over union."""

from collections.abc import Sequence

from torch import Tensor

from halfpass.errors import InputError
from halfpass.tasks.losses import CrossEntropy
from halfpass.tasks.task import Options, Spec, Task, check_classes, count_classes, of_torchmetrics, one_tensor, weights
from halfpass.tree import Tree

EXPECTED = "a class for each pixel, int64 or uint8 (N, H, W)"
VOID = 255  # as Pascal VOC and Cityscapes mark pixels that are not labelled


def count(place: str, splits: Sequence[Tree], options: Options) -> int:
    """How many classes there are; raises InputError where the targets are none."""
    masks = [one_tensor(place, split, EXPECTED) for split in splits]
    for mask in masks:
        if mask.is_floating_point() or mask.ndim != 3:
            found = f"{mask.dtype} {tuple(mask.shape)}"
            raise InputError(place, EXPECTED, found, "give class numbers, without a dimension of channels")
    return count_classes(place, masks, options, _ignored(options))


def _ignored(options: Options) -> int:
    return VOID if options.ignore_index is None else options.ignore_index


def build(outputs: int, targets: Spec, options: Options) -> Task:
    ignored = _ignored(options)
    loss = CrossEntropy(
        weights("task.class_weights", options.class_weights, outputs), ignored, options.label_smoothing
    )
    ((_, pixels),) = targets.values()

    def measured(answers: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        return answers.argmax(1), found.long()

    return Task(
        "segmentation", outputs, loss, of_torchmetrics("segmentation", outputs, ignored), "mean_iou",
        output_shape=(outputs, *pixels), measured=measured,
        check=lambda place, found: check_classes(place, found, outputs, ignored),
    )  # fmt: skip
