"""Data sets that people bring: `module:function`, or any pair of torch data sets.

`data()` or, where data.path is set, `data(path=...)` returns (train, test), each with a length and items by number. An
item is (input, target), or a dict whose key `labels` is the target. Input and target are each a tensor, array or
number, or a tuple or dict of those. An attribute `classes` names the classes or target columns in order; `draws` says
whether items are others each time; `collate`, a function of a list of items such as a collator of transformers, makes
each item what it is to be. Floating point becomes float32, integers int64; uint8 inputs of three dimensions are
pictures. Check: `pytest tests/test_own_data.py`.
"""

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from halfpass.data.samples import (
    INTEGERS,
    Dataset,
    Samples,
    Stream,
    array_generators,
    described,
    draw,
    fast_layout,
    outputs,
    overlap,
    seeded,
    with_note,
    with_statistics,
)  # fmt: skip
from halfpass.errors import InputError, reason
from halfpass.plugin import call_plugin
from halfpass.tree import Tree, flatten, leaves, map_leaves

LOADING = ("auto", "memory", "stream")
DATA_SEED = 20_071  # of what data() and the reading of its items draw, in every process and in every run
FEW, MANY = 8, 64  # samples that a size is estimated from, and that known labels are compared with


def read_function(
    name: str, path: str | None, *, loading: str = "auto", workers: int = 0, classes: str | None = None
) -> Dataset:
    """The data set that `module:function` returns. It runs under a fixed seed, so that a random split is the same in
    every process, in a resumed run and at export."""
    place = f"data {name}"
    with seeded(DATA_SEED):
        splits = call_plugin(place, name, check=lambda function: _named_path(name, function, path))
    if not isinstance(splits, (tuple, list)) or len(splits) != 2:
        raise InputError(place, "(train, test)", type(splits).__name__, "return two data sets")
    return from_datasets(name, *splits, loading=loading, workers=workers, classes=classes)


def _named_path(name: str, function: Callable[..., object], path: str | None) -> dict[str, object]:
    """`path=` for the function, where it is set and the function takes it."""
    try:
        taken = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of some functions written in C
        return {} if path is None else {"path": path}
    named = [parameter for parameter in taken if parameter.name == "path"]
    if path is None:
        if named and named[0].default is inspect.Parameter.empty:
            raise InputError("data.path", f"the path that {name} takes", "none", "set data.path")
        return {}
    if not named and not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken):
        remedy = "give the function an argument path, or leave data.path out"
        raise InputError("data.path", f"none, because {name} takes no path", repr(path), remedy)
    return {"path": str(Path(path).expanduser())}


def from_datasets(
    name: str, train: object, test: object, *, loading: str = "auto", workers: int = 0, classes: str | None = None
) -> Dataset:
    """A data set out of two of PyTorch's, with what they say of themselves.

    `loading`: `memory` takes every item once; `stream` takes the items of a batch when it is due, in `workers`
    processes; `auto` does the latter where the training items are drawn anew each time, or do not fit into memory.
    `classes` counts the classes or names them, separated by commas, in order. Raises InputError for items that cannot
    be used.
    """
    place = f"data {name}"
    read = [
        _read_split(f"{place}, {part}", split, loading=loading, workers=workers, once=part == "test")
        for part, split in (("train", train), ("test", test))
    ]
    first, second = (samples for samples, _ in read)
    names = _names(place, train, classes)
    number = int(classes) if classes is not None and classes.isdigit() else _count(place, first, second, names)
    data = with_statistics(name, first, second, number, names)
    return with_overlap(with_note(data, *(note for _, note in read if note)))


def with_overlap(data: Dataset) -> Dataset:
    """`data`, with a note where test samples are training samples too."""
    if isinstance(data.train, Stream) or isinstance(data.test, Stream):
        return data
    if (both := overlap(data.train, data.test)) == 0:
        return data
    return with_note(
        data, f"data {data.name}: {both} of {len(data.test)} test samples are training samples too, and tell little"
    )


def class_names(classes: str | None) -> tuple[str, ...]:
    """`cat,dog` → its names; of a number, none. Raises InputError for a name that comes twice or is empty."""
    if classes is None or classes.isdigit():
        return ()
    names = tuple(name.strip() for name in classes.split(","))
    if len(set(names)) < len(names) or "" in names:
        raise InputError("data.classes", "different names separated by commas", repr(classes), "for example cat,dog")
    return names


def _names(place: str, train: object, classes: str | None) -> tuple[str, ...]:
    own = getattr(_base(train), "classes", None)  # torchvision's data sets list their classes
    own_names = tuple(map(str, own)) if isinstance(own, (list, tuple)) else ()
    if twice := next((name for name in own_names if own_names.count(name) > 1), None):
        raise InputError(f"{place}, classes", "a name of its own for each", f"{twice!r} twice", "rename them")
    chosen = class_names(classes)
    if chosen and own_names and chosen != own_names:
        remedy = "number the labels by data.classes, and let the data set's `classes` say so"
        expected = f"those of data.classes, {', '.join(chosen)}"
        raise InputError(f"{place}, classes", expected, ", ".join(own_names), remedy)
    return chosen or own_names


def _count(place: str, train: Samples, test: Samples, names: tuple[str, ...]) -> int:
    large = isinstance(train, Stream) and train.known is None and not fits(train.items)
    if not names and large and "int64" in train.kinds()[1]:
        expected = "the classes of a data set that is too large to be read for them"
        raise InputError("data.classes", expected, "none", f"count or name them, or let {place} have `classes`")
    return outputs(train, test, names)


def _base(dataset: object) -> object:
    """What subsets (`random_split`) are taken from."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


# --- One split --------------------------------------------------------------------------------------------------------


def _read_split(place: str, dataset: Any, *, loading: str, workers: int, once: bool) -> tuple[Samples, str | None]:
    """Its samples, and what is to be said of them. `once`: they are never drawn anew."""
    plain = isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2
    if plain and getattr(dataset, "collate", None) is None:
        return _whole(place, *dataset.tensors), None
    items = OwnItems(place, dataset)
    if len(items) == 0:
        return Samples(torch.empty(0, 1), torch.empty(0, dtype=torch.int64)), None
    draws = getattr(_base(dataset), "draws", None)
    anew, note = (draws, None) if once or loading != "auto" or draws is not None else draws_anew(items)
    every = torch.arange(len(items))
    if loading == "stream" or (loading == "auto" and ((anew and not once) or not fits(items))):
        return Stream(items, every, workers, _known_labels(dataset, items)), note
    with _watched(items):
        samples = filled(items)
    if items.drew and loading == "auto" and draws is None and not once:  # not with the first, but with another
        return Stream(items, every, workers, _known_labels(dataset, items)), note
    return samples, note


def _whole(place: str, inputs: Tensor, targets: Tensor) -> Samples:
    """A TensorDataset's, without a look at each item."""
    try:
        return Samples(fast_layout(_converted(inputs)), _as_target(inputs.ndim and len(inputs), targets))
    except InputError as error:
        raise InputError(f"{place}, {error.place}", error.expected, error.found, error.remedy) from None


def _as_target(samples: int, targets: Tensor) -> Tensor:
    targets = _converted(targets, uint8=True)
    return targets[:, 0] if targets.dtype == torch.int64 and targets.shape == (samples, 1) else targets


class OwnItems:
    """The items of a user's data set, converted and checked one by one."""

    def __init__(self, place: str, dataset: Any) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise InputError(place, "a data set with a length", type(dataset).__name__, "return indexable data sets")
        self.place, self.dataset = place, dataset
        self.collate = getattr(_base(dataset), "collate", None)
        self.kinds: list[str] | None = None  # of the first item that was taken
        self.drew = False  # whether one drew from a global generator

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tree, Tree]:
        place = f"{self.place}, sample {index}"
        before = random.getstate()
        try:
            item = self.dataset[index]
            if self.collate is not None:  # each alone, so that what it draws at random is that sample's
                item = _alone(place, self.collate([item]))
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # whatever the data set raises
            raise InputError(place, "(input, target)", reason(error), "mend the data set") from error
        self.drew = self.drew or random.getstate() != before
        inputs, targets = _pair(place, item)
        kinds = [described(map_leaves(lambda leaf: leaf[None], tree)) for tree in (inputs, targets)]
        self.kinds = self.kinds or kinds
        for kind, first in zip(kinds, self.kinds, strict=True):
            if kind != first:
                remedy = "resize or convert in the data set"
                remedy = remedy if self.collate is None else "pad all to one length in collate"
                raise InputError(place, f"{first} like the first", kind, remedy)
        for name, leaf in flatten(inputs).items():
            if leaf.is_floating_point() and not leaf.isfinite().all():
                what = f"input {index}" + (f", {name!r}" if name else "")
                raise InputError(f"{self.place}, {what}", "finite values", "NaN or infinity", "mend or remove it")
        return inputs, targets


def _alone(place: str, batch: Any) -> Any:
    """The one sample of a batch: its values without their first dimension."""
    if isinstance(batch, Mapping):
        return {key: _alone(place, part) for key, part in batch.items()}
    if isinstance(batch, (tuple, list)) and not _is_numbers(batch):
        return tuple(_alone(place, part) for part in batch)
    if isinstance(batch, (Tensor, np.ndarray, list)) and np.ndim(batch) > 0 and len(batch) == 1:
        return batch[0]
    found = tuple(batch.shape) if isinstance(batch, (Tensor, np.ndarray)) else type(batch).__name__
    raise InputError(f"{place}, collate", "tensors of one sample, of one item", str(found), "put the samples first")


def _pair(place: str, item: object) -> tuple[Tree, Tree]:
    if isinstance(item, Mapping) and "labels" in item:
        value, target = {key: part for key, part in item.items() if key != "labels"}, item["labels"]
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        value, target = item
    else:
        found = f"a tuple of {len(item)}" if isinstance(item, (tuple, list)) else type(item).__name__
        expected = "(input, target), or a dict with a key 'labels'"
        raise InputError(place, expected, found, "convert it in the data set")
    targets = _tree(f"{place}, target", target, uint8=True)
    if isinstance(targets, Tensor) and targets.dtype == torch.int64 and targets.shape == (1,):
        targets = targets[0]  # a class number in a list of its own
    return _tree(f"{place}, input", value), targets


def _tree(place: str, value: object, *, uint8: bool = False) -> Tree:
    if isinstance(value, Mapping) and value:
        for key in value:
            if not isinstance(key, str) or not key or "/" in key or key.startswith("#"):
                raise InputError(place, "names without / or #", repr(key), "name it otherwise in the data set")
        return {key: _tree(f"{place} {key!r}", part, uint8=uint8) for key, part in value.items()}
    if isinstance(value, tuple) and value:
        return tuple(_tree(f"{place} #{i}", part, uint8=uint8) for i, part in enumerate(value))
    if isinstance(value, (Tensor, np.ndarray, np.generic, bool, int, float)) or _is_numbers(value):
        try:
            tensor = value if isinstance(value, Tensor) else from_array(np.asarray(value))
        except (TypeError, ValueError, OverflowError):  # objects
            found = str(getattr(value, "dtype", type(value).__name__))
            raise InputError(place, "numbers", found, "convert it in the data set") from None
        return _converted(tensor, uint8=uint8)
    raise InputError(place, "a tensor, array or number", type(value).__name__, "convert it in the data set")


def _is_numbers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, (bool, int, float)) for part in value)


def from_array(array: np.ndarray) -> Tensor:
    if array.dtype.kind == "u" and array.itemsize > 1:
        array = array.astype(np.int64)
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True))


def _converted(tensor: Tensor, *, uint8: bool = False) -> Tensor:
    """Floating point as float32, integers as int64; `uint8` says whether those are integers too."""
    tensor = tensor.detach()
    if tensor.is_floating_point():
        return tensor.float()
    return tensor.to(torch.int64) if tensor.dtype in INTEGERS or (uint8 and tensor.dtype == torch.uint8) else tensor


@contextmanager
def _watched(items: OwnItems) -> Iterator[None]:
    """Under the fixed seed; notes whether the items draw."""
    with seeded(DATA_SEED):
        before = array_generators()
        yield
        items.drew = items.drew or array_generators() != before


def draws_anew(items: OwnItems) -> tuple[bool, str | None]:
    """Whether the first item is another each time, or draws at random in vain; and what is to be said of it."""
    with _watched(items):
        first = items[0]
    with seeded(DATA_SEED):
        same = all(torch.equal(a, b) for a, b in zip(leaves(first), leaves(items[0]), strict=True))
    if same:
        return items.drew, None
    return True, (
        f"{items.place}: items differ under the same seed, so a resumed run draws others; "
        "draw from torch's, numpy's or Python's global generator"
    )


def filled(items: OwnItems) -> Samples:
    """Every item, taken once, in order."""
    inputs, targets = items[0]
    count = len(items)
    whole = [
        map_leaves(lambda leaf: leaf.new_empty(count, *leaf.shape), tree) for tree in (inputs, targets)
    ]
    rows = leaves((whole[0], whole[1]))
    for i in range(count):
        for row, leaf in zip(rows, leaves((inputs, targets) if i == 0 else items[i]), strict=True):
            row[i] = leaf
    try:
        return Samples(map_leaves(fast_layout, whole[0]), whole[1])
    except InputError as error:
        raise InputError(f"{items.place}, {error.place}", error.expected, error.found, error.remedy) from None


def _known_labels(dataset: Any, items: OwnItems) -> Tensor | None:
    """What torchvision's data sets list as `targets`, where it is what the items say."""
    listed = _listed(dataset)
    if listed is None or len(listed) != len(items):
        return None
    for index in np.linspace(0, len(items) - 1, min(MANY, len(items))).astype(int).tolist():
        target = draw(items, index)[1]
        if not isinstance(target, Tensor) or target.ndim or target.dtype != torch.int64 or target != listed[index]:
            return None
    return listed


def _listed(dataset: Any) -> Tensor | None:
    if isinstance(dataset, Subset):
        below = _listed(dataset.dataset)
        return None if below is None else below[torch.as_tensor(list(dataset.indices), dtype=torch.int64)]
    try:
        listed = torch.as_tensor(dataset.targets)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None
    return listed.to(torch.int64) if listed.ndim == 1 and listed.dtype in INTEGERS else None


def fits(items: Any) -> bool:
    """Whether all items fit into memory, with room for each client's copy: by the size of the first ones."""
    some = [draw(items, index) for index in range(min(FEW, len(items)))]
    each = sum(leaf.nbytes for pair in some for leaf in leaves(pair)) / max(len(some), 1)
    return 4 * each * len(items) <= available_bytes()


def available_bytes() -> float:
    """Memory that can be had without swapping, in this container; without limit where the system does not say."""
    known = [_field(Path("/proc/meminfo"), "MemAvailable:", 1024)]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if (most := _field(limit, "", 1)) is not None and (now := _field(used, "", 1)) is not None:
        known.append(most - now)
    return min((value for value in known if value is not None), default=float("inf"))


def _field(file: Path, name: str, unit_bytes: int) -> float | None:
    try:
        line = next(line for line in file.read_text().splitlines() if line.startswith(name))
        return float(line.removeprefix(name).split()[0]) * unit_bytes
    except (OSError, StopIteration, ValueError, IndexError):
        return None
