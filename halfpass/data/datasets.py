"""Data: a name → all samples as tensors in memory. Their batches: `batches.py`. Check: `pytest tests/test_data.py`.

A new data set is a function of a Source in DATASETS, and where its shape is fixed, a line in KNOWN_SHAPES.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import TensorDataset

from halfpass.data.cifar import CIFAR, read_cifar
from halfpass.data.imagefolder import read_imagefolder
from halfpass.data.listops import CLASSES, LENGTH, generate_listops
from halfpass.errors import InputError, choice_error, reason
from halfpass.plugin import call_plugin
from halfpass.seed import derive_seed

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs and their labels, in memory. Raises InputError where shapes or dtypes are others."""

    inputs: Tensor  # (N, C, H, W) uint8, fastest in channels-last memory; (N, T) int64 tokens; (N, ...) floating point
    labels: Tensor  # (N,) int64, or the task's targets (N, ...)

    def __post_init__(self) -> None:
        inputs, labels = self.inputs, self.labels
        pictures = inputs.dtype == torch.uint8 and inputs.ndim == 4
        tokens = inputs.dtype == torch.int64 and inputs.ndim == 2
        if inputs.ndim == 0 or not (pictures or tokens or inputs.is_floating_point()):
            expected = "uint8 (N, C, H, W), int64 (N, T) or floating point (N, ...)"
            found = f"{inputs.dtype} {tuple(inputs.shape)}"
            raise InputError("inputs", expected, found, "convert them, samples first")
        if labels.shape[:1] != inputs.shape[:1] or (labels.ndim == 1 and labels.dtype in (torch.int32, torch.uint8)):
            raise InputError(
                "labels", f"int64 ({len(inputs)},)", f"{labels.dtype} {tuple(labels.shape)}", "give a class per sample"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def targets(self) -> Tensor:
        return self.labels

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one input, without the batch."""
        return tuple(self.inputs.shape[1:])

    def take(self, indices: Int64[Tensor, " M"]) -> "Samples":
        """A copy of the samples that `indices` number, in that order."""
        return Samples(self.inputs[indices], self.labels[indices])  # this indexing keeps channels last in memory

    def to(self, device: torch.device) -> "Samples":
        """The samples on `device`, where batches are then drawn and augmented too; as they are where that is a GPU and
        they would take more than a quarter of its free memory."""
        if device.type == "cuda" and 4 * self.inputs.nbytes > torch.cuda.mem_get_info(device)[0]:
            return self
        return Samples(self.inputs.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """What one name stands for. Raises InputError for an empty or unequal split, a label or a value out of range."""

    name: str
    train: Samples
    test: Samples
    classes: int
    mean: tuple[float, ...]  # per channel, of inputs / 255; empty for floating point inputs, taken as they are
    std: tuple[float, ...]
    crop_padding: int | None = None  # pixels; in training, random crop and horizontal flip; None: neither

    def __post_init__(self) -> None:
        for part, split in (("train", self.train), ("test", self.test)):
            _check_samples(f"data {self.name}, {part}", split, self.classes)
        kinds = [f"{split.inputs.dtype} {split.sample_shape}" for split in (self.train, self.test)]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"data {self.name}", f"test samples like the training samples, {kinds[0]}", kinds[1],
                "convert both alike",
            )
        _check_statistics(self)


def _check_samples(place: str, samples: Samples, classes: int) -> None:
    if len(samples) == 0:
        raise InputError(place, "at least one sample", "none", "give samples to both splits")
    outside = (samples.labels < 0) | (samples.labels >= classes)
    if samples.labels.dtype == torch.int64 and samples.labels.ndim == 1 and outside.any():
        i = int(outside.nonzero()[0])
        raise InputError(
            f"{place}, label {i}", f"a class in 0..{classes - 1}", f"{int(samples.labels[i])}",
            "number the classes from 0",
        )
    if samples.inputs.is_floating_point():
        broken = ~samples.inputs.isfinite().reshape(len(samples), -1).all(1)
        if broken.any():
            i = int(broken.nonzero()[0])
            raise InputError(f"{place}, input {i}", "finite values", "NaN or infinity", "mend or remove it")


def _check_statistics(data: Dataset) -> None:
    channels = data.train.sample_shape[0] if data.train.inputs.dtype == torch.uint8 else 0
    if not len(data.mean) == len(data.std) == channels or any(std <= 0 for std in data.std):
        raise InputError(
            f"data {data.name}, mean and std", f"{channels} of each, std above 0", f"{data.mean} and {data.std}",
            "give one per channel to uint8 inputs, none to floating point",
        )
    shape, padding = data.train.sample_shape, data.crop_padding
    if padding is not None and not (len(shape) == 3 and 0 <= padding < min(shape[1:])):
        expected = "pictures (C, H, W), with a margin less than their height and width"
        raise InputError(f"data {data.name}", expected, f"{shape} with {padding}", "change data.crop_padding")


# --- A name → a data set ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """What a reader is asked for; the arguments of `load`."""

    name: str
    path: str | None
    limit: int | None
    download: bool
    image_size: int  # pixels, of a side
    crop_padding: int  # pixels, on each side


def load(
    name: str, path: str | None = None, *, limit: int | None = None, download: bool = False, image_size: int = 32,
    crop_padding: int = 2, validation: int | None = None,
) -> Dataset:  # fmt: skip
    """The data set of that name: one of `DATASETS`, or `module:function`.

    A `module:function` takes no arguments and returns train and test, each a `torch.utils.data.Dataset` of (input,
    label); the working directory may hold the module. `path` is where files are read from. `limit` keeps at most that
    many of the first training samples and as many test samples. `download` lets CIFAR be fetched into `path`.
    `image_size`, in pixels, is for `imagefolder`, `crop_padding` for CIFAR. `validation` puts so many training samples,
    drawn once and for all, in the test set's place; pictures are normalized as ever. Raises InputError that names the
    argument, file or sample at fault.
    """
    if limit is not None and limit < 1:
        raise InputError("data.limit", "at least 1 sample", f"{limit}", "leave it out for all samples")
    if name not in DATASETS and ":" not in name:
        raise choice_error("data.name", [*DATASETS, "module:function"], name)
    needed = limit if validation is None else None  # all, to hold some out
    data = DATASETS.get(name, _function)(Source(name, path, needed, download, image_size, crop_padding))
    if validation is not None:
        data = _held_out(data, validation)
    return replace(data, train=_first(data.train, limit), test=_first(data.test, limit))


def _held_out(data: Dataset, count: int) -> Dataset:
    samples = len(data.train)
    if not 1 <= count < samples:
        raise InputError("data.validation", f"1 to {samples - 1} of {samples} samples", f"{count}", "hold out fewer")
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(derive_seed("validation")))
    return replace(data, train=data.train.take(order[count:].sort().values), test=data.train.take(order[:count]))


def _first(samples: Samples, limit: int | None) -> Samples:
    if limit is None or limit >= len(samples):
        return samples
    return samples.take(torch.arange(limit))  # a copy, so that the rest is freed


def _digits(source: Source) -> Dataset:
    """Scikit-learn's 1,797 handwritten digits of 8×8 pixels in 0..16: always the same fifth of every class is test."""
    from sklearn.datasets import load_digits  # here, because the import takes a second that other data need not pay
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    inputs = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 8, 8)  # (N, 1, 8, 8)
    everything = Samples(inputs, torch.from_numpy(labels).to(torch.int64))
    split = [everything.take(torch.from_numpy(part)) for part in (train, test)]
    return _with_statistics(source.name, split[0], split[1], classes=10)


def _cifar(source: Source) -> Dataset:
    layout = CIFAR[source.name]
    train, test = (Samples(*split) for split in read_cifar(layout, source.path, source.download))
    return Dataset(source.name, train, test, layout.classes, layout.mean, layout.std, source.crop_padding)


def _imagefolder(source: Source) -> Dataset:
    train, test, classes = read_imagefolder(source.path, source.image_size, source.limit)
    return Dataset(source.name, Samples(*train), Samples(*test), len(classes), IMAGENET_MEAN, IMAGENET_STD)


def _listops(source: Source) -> Dataset:
    train, test = generate_listops()
    return Dataset(source.name, Samples(*train), Samples(*test), CLASSES, mean=(), std=())


DATASETS: dict[str, Callable[[Source], Dataset]] = {
    "digits": _digits, "cifar10": _cifar, "cifar100": _cifar, "imagefolder": _imagefolder,
    "listops": _listops,
}
KNOWN_SHAPES: dict[str, tuple[tuple[int, ...], int]] = {  # sample shape and classes, where they need no look at files
    "digits": ((1, 8, 8), 10),
    **{name: ((3, 32, 32), layout.classes) for name, layout in CIFAR.items()},
    "listops": ((LENGTH,), CLASSES),
}


def _with_statistics(name: str, train: Samples, test: Samples, classes: int) -> Dataset:
    make = partial(Dataset, name, train, test, classes)
    if train.inputs.dtype != torch.uint8:
        return make(mean=(), std=())
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in train.inputs.unbind(1):  # (N, H, W); counted, because a copy as floating point is 4 to 8 × larger
        share = channel.flatten().bincount(minlength=256) / channel.numel()
        mean = float(share.double() @ values)
        means.append(mean)
        deviations.append(max(float(share.double() @ (values - mean) ** 2) ** 0.5, 1 / 255))  # a constant channel has 0
    return make(mean=tuple(means), std=tuple(deviations))


# --- module:function --------------------------------------------------------------------------------------------------


def _function(source: Source) -> Dataset:
    place = f"data {source.name}"
    splits = call_plugin(place, source.name)
    if not isinstance(splits, (tuple, list)) or len(splits) != 2:
        raise InputError(place, "(train, test)", type(splits).__name__, "return two data sets")
    train, test = (_decoded(f"{place}, {part}", split) for part, split in zip(("train", "test"), splits, strict=True))
    named = getattr(splits[0], "classes", None)  # torchvision's data sets list their classes; else the labels tell
    seen = 1 + max(int(part.labels.nan_to_num().max()) if len(part) else 0 for part in (train, test))
    return _with_statistics(source.name, train, test, len(named) if isinstance(named, (list, tuple)) else seen)


def _decoded(place: str, dataset: object) -> Samples:
    """Every item of a data set, taken once."""
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        inputs, labels = dataset.tensors
    elif not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise InputError(place, "a data set with a length", type(dataset).__name__, "return indexable data sets")
    else:
        inputs, labels = _stacked(place, [_taken(f"{place}, sample {i}", dataset, i) for i in range(len(dataset))])
    inputs = inputs.detach().float() if inputs.is_floating_point() else inputs
    if inputs.ndim == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    try:
        return Samples(inputs, labels if labels.is_floating_point() else labels.to(torch.int64))
    except InputError as error:
        raise InputError(f"{place}, {error.place}", error.expected, error.found, error.remedy) from None


def _taken(place: str, dataset: Any, index: int) -> object:
    try:
        return dataset[index]
    except Exception as error:  # whatever the data set raises
        raise InputError(place, "(input, label)", reason(error), "mend the data set") from error


def _stacked(place: str, items: list[object]) -> tuple[Tensor, Tensor]:
    pairs = [_item(f"{place}, sample {i}", item) for i, item in enumerate(items)]
    kinds = [f"{value.dtype} {tuple(value.shape)}" for value, _ in pairs]
    for i, kind in enumerate(kinds):
        if kind != kinds[0]:
            remedy = "resize or convert in the data set"
            raise InputError(f"{place}, sample {i}", f"{kinds[0]} like the first", kind, remedy)
    inputs = torch.stack([value for value, _ in pairs]) if pairs else torch.empty(0, 1)
    return inputs, torch.tensor([label for _, label in pairs], dtype=torch.int64)


def _item(place: str, item: object) -> tuple[Tensor, int]:
    remedy = "convert it in the data set"
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise InputError(place, "(input, label)", type(item).__name__, remedy)
    value, label = item
    if not isinstance(value, (Tensor, np.ndarray)):
        raise InputError(place, "a tensor or array", type(value).__name__, remedy)
    try:
        return torch.as_tensor(value), operator.index(label)
    except (TypeError, ValueError):  # objects, bytes in another order, or a label that is no whole number
        found = f"{getattr(value, 'dtype', '')} and {type(label).__name__}"
        raise InputError(place, "numbers and a class number", found, remedy) from None
