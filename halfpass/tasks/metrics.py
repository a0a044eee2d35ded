"""Metrics: torchmetrics' own, made fit for targets of which some are unlabelled or of a kind that a test set lacks.

Imported only where a test is made: torchmetrics takes seconds to import.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassJaccardIndex,
)
from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_f1_score
from torchmetrics.functional.regression import r2_score
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError
from torchmetrics.text import Perplexity
from torchmetrics.utilities.data import dim_zero_cat

FEW_CLASSES = 100  # an area under a curve is made for each class; of more classes it is left out
TOP = 5


class Accuracy(MulticlassAccuracy):
    """Right answers of all, in double precision: as exact as the two numbers."""

    def __init__(self, outputs: int, ignore_index: int | None = None, top_k: int = 1) -> None:
        super().__init__(outputs, top_k, average="micro", ignore_index=ignore_index, validate_args=False)

    def compute(self) -> Tensor:
        tp, _, _, fn = (torch.as_tensor(count).double().sum() for count in self._final_state())
        return tp / (tp + fn)


class PerColumn(Metric):
    """A function of each column's predictions and targets, those that are known; NaN where it is not defined. The mean
    of the columns that have one, or all of them."""

    full_state_update = False
    predictions: list[Tensor]
    targets: list[Tensor]

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], defined: Callable[[Tensor], bool], mean: bool):
        super().__init__()
        self.function, self.defined, self.mean = function, defined, mean
        self.add_state("predictions", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        if targets.ndim < predictions.ndim:  # class numbers
            targets = _one_hot(targets, predictions.shape[1])
        self.predictions.append(predictions)
        self.targets.append(targets)

    def compute(self) -> Tensor:
        predictions, targets = dim_zero_cat(self.predictions), dim_zero_cat(self.targets)
        values = torch.stack([self._of(*column) for column in zip(predictions.T, targets.T, strict=True)])
        return values.nanmean() if self.mean else values

    def _of(self, predictions: Tensor, targets: Tensor) -> Tensor:
        known = ~targets.isnan()
        if not self.defined(targets[known]):
            return torch.tensor(float("nan"), device=targets.device)
        return self.function(predictions[known], targets[known]).float()


def _one_hot(targets: Tensor, classes: int) -> Tensor:
    """Class numbers → columns of 0 and 1, NaN for what is no class."""
    labelled = (targets >= 0) & (targets < classes)
    columns = torch.nn.functional.one_hot(targets.where(labelled, 0), classes).float()
    return columns.masked_fill(~labelled[:, None], float("nan"))


def _both(targets: Tensor) -> bool:
    return bool((targets == 1).any() and (targets == 0).any())


def _any(targets: Tensor) -> bool:
    return len(targets) > 0


def _several(targets: Tensor) -> bool:
    return len(targets) > 1 and bool((targets != targets[0]).any())


def _auroc(predictions: Tensor, targets: Tensor) -> Tensor:
    return binary_auroc(predictions, targets.long(), validate_args=False)


def _average_precision(predictions: Tensor, targets: Tensor) -> Tensor:
    return binary_average_precision(predictions, targets.long(), validate_args=False)


def _f1(predictions: Tensor, targets: Tensor) -> Tensor:
    return binary_f1_score(predictions, targets.long(), validate_args=False)


def _r2(predictions: Tensor, targets: Tensor) -> Tensor:
    return r2_score(predictions.double(), targets.double())


class _Absolute(MeanAbsoluteError):
    def update(self, predictions: Tensor, targets: Tensor) -> None:
        known = ~targets.isnan()
        super().update(predictions[known], targets[known])


class _RootOfSquared(MeanSquaredError):
    def update(self, predictions: Tensor, targets: Tensor) -> None:
        known = ~targets.isnan()
        super().update(predictions[known], targets[known])


class _TokenAccuracy(Accuracy):
    def update(self, predictions: Tensor, targets: Tensor) -> None:
        super().update(predictions.argmax(-1), targets)


def classification(outputs: int, ignore_index: int | None) -> MetricCollection:
    """Of class probabilities (B, classes) and class numbers (B,)."""
    found: dict[str, Any] = {"accuracy": Accuracy(outputs, ignore_index)}
    if outputs > TOP:
        found[f"top_{TOP}_accuracy"] = Accuracy(outputs, ignore_index, TOP)
    found["f1_macro"] = MulticlassF1Score(outputs, average="macro", ignore_index=ignore_index, validate_args=False)
    if outputs <= FEW_CLASSES:
        found["auroc_macro"] = PerColumn(_auroc, _both, True)
    return _collection(found)


def multilabel() -> MetricCollection:
    """Of probabilities (B, labels) and targets (B, labels) of 0, 1 and NaN."""
    return _collection({
        "auroc_macro": PerColumn(_auroc, _both, True), "auroc": PerColumn(_auroc, _both, False),
        "map": PerColumn(_average_precision, _both, True), "f1_macro": PerColumn(_f1, _any, True),
    })  # fmt: skip


def regression() -> MetricCollection:
    """Of values (B, columns) and targets (B, columns), some of which may be NaN."""
    r2 = PerColumn(_r2, _several, True)
    return _collection({"r2": r2, "mae": _Absolute(), "rmse": _RootOfSquared(squared=False)})


def segmentation(outputs: int, ignore_index: int | None) -> MetricCollection:
    """Of classes (B, H, W) and targets (B, H, W)."""
    options: dict[str, Any] = {"average": "macro", "ignore_index": ignore_index, "validate_args": False}
    return _collection({
        "mean_iou": MulticlassJaccardIndex(outputs, **options), "dice": MulticlassF1Score(outputs, **options),
        "pixel_accuracy": Accuracy(outputs, ignore_index),
    })  # fmt: skip


def tokens(outputs: int, ignore_index: int | None) -> MetricCollection:
    """Of logits (B, T, outputs) and targets (B, T)."""
    return _collection({
        "accuracy": _TokenAccuracy(outputs, ignore_index), "perplexity": Perplexity(ignore_index),
    })  # fmt: skip


def collection(found: object) -> MetricCollection:
    """A user's metrics, whatever they are given as."""
    return found if isinstance(found, MetricCollection) else MetricCollection(found)  # type: ignore[arg-type]


def _collection(metrics: dict[str, Any]) -> MetricCollection:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torchmetrics says of memory
        return MetricCollection(metrics)
