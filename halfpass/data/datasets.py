"""Data: a name → a data set. Their batches: `batches.py`. Check: `pytest tests/test_data.py tests/test_own_data.py`.

A new data set is one file with a function of a Source and one row in DATASETS; where its shape is fixed, a line in
KNOWN_SHAPES.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch

from halfpass.data.cifar import CIFAR, read_cifar
from halfpass.data.digits import read_digits
from halfpass.data.imagefolder import read_imagefolder
from halfpass.data.imagetable import read_imagetable
from halfpass.data.listops import CLASSES, LENGTH, read_listops
from halfpass.data.own import from_datasets, read_function
from halfpass.data.samples import Dataset, Samples, Stream
from halfpass.data.source import Source
from halfpass.data.tables import read_table
from halfpass.errors import InputError, choice_error
from halfpass.seed import derive_seed

__all__ = ["DATASETS", "KNOWN_SHAPES", "Dataset", "Samples", "Source", "Stream", "from_datasets", "load"]


class Entry(NamedTuple):
    read: Callable[[Source], Dataset]
    settings: tuple[str, ...]  # that it heeds, beside name, limit and validation


def _own(source: Source) -> Dataset:
    return read_function(
        source.name, source.path, loading=source.loading, workers=source.workers, classes=source.classes
    )


_CIFAR = Entry(read_cifar, ("path", "download", "crop_padding"))
_FILES = ("path", "classes", "normalization")
_PICTURES = ("image_size", "gray_range", "loading", "workers")
DATASETS: dict[str, Entry] = {
    "digits": Entry(read_digits, ()),
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "imagefolder": Entry(read_imagefolder, (*_FILES, *_PICTURES)),
    "imagetable": Entry(
        read_imagetable, (*_FILES, *_PICTURES, "target", "target_kind", "picture", "separator", "test_share")
    ),
    "csv": Entry(read_table, (*_FILES, "target", "target_kind", "ignore", "categorical", "separator", "test_share")),
    "listops": Entry(read_listops, ()),
}
_OWN = Entry(_own, (*_FILES, "loading", "workers"))
KNOWN_SHAPES: dict[str, tuple[tuple[int, ...], int]] = {  # sample shape and classes, where they need no look at files
    "digits": ((1, 8, 8), 10),
    **{name: ((3, 32, 32), layout.classes) for name, layout in CIFAR.items()},
    "listops": ((LENGTH,), CLASSES),
}


def load(name: str, path: str | None = None, **settings: Any) -> Dataset:
    """The data set of that name: one of `DATASETS`, or `module:function` (see `own.py`), which the working directory
    may hold.

    `settings` are the other fields of Source, named as in the configuration, which explains them. `validation` puts so
    many training samples, drawn once and for all, in the test set's place; pictures are normalized as ever. Raises
    InputError that names the argument, file or sample at fault, or a setting that the data set takes no notice of.
    """
    source = Source(name, path, **settings)
    limit, validation = source.limit, source.validation
    if limit is not None and limit < 1:
        raise InputError("data.limit", "at least 1 sample", f"{limit}", "leave it out for all samples")
    if name not in DATASETS and ":" not in name:
        raise choice_error("data.name", [*DATASETS, "module:function"], name)
    entry = DATASETS.get(name, _OWN)
    _refuse_unused(source, entry.settings)
    needed = limit if validation is None else None  # all, to hold some out
    data = entry.read(replace(source, limit=needed))
    if validation is not None:
        data = _held_out(data, validation)
    return replace(data, train=_first(data.train, limit), test=_first(data.test, limit))


def _refuse_unused(source: Source, used: tuple[str, ...]) -> None:
    for field in fields(Source):
        value = getattr(source, field.name)
        if field.name not in ("name", "limit", "validation", *used) and value != field.default:
            choices = [name for name, entry in DATASETS.items() if field.name in entry.settings]
            choices += ["module:function"] if field.name in _OWN.settings else []
            raise InputError(
                f"data.{field.name}", f"its default with data.name {source.name}, which takes no notice of it",
                repr(value), f"leave it out, or set data.name ({', '.join(choices)})",
            )  # fmt: skip


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
