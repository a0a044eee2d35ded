"""Samples of a data set: in memory, or drawn when their batch is due. Check: `pytest tests/test_own_data.py`.

Inputs and targets are trees (`halfpass/tree.py`). What targets mean is the task's.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from halfpass.errors import InputError
from halfpass.seed import derive_seed
from halfpass.tree import Tree, flatten, leaves, map_leaves

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32)


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs and their targets, in memory, samples first. Raises InputError where shapes or dtypes are others.

    An input tensor is pictures, (N, C, H, W) uint8, fastest in channels-last memory; or (N, ...) int64, bool or
    floating point. A target tensor is (N, ...) int64, bool or floating point.
    """

    inputs: Tree
    targets: Tree

    def __post_init__(self) -> None:
        for what, tree in (("inputs", self.inputs), ("targets", self.targets)):
            for name, leaf in flatten(tree).items():
                _check_leaf(f"{what} {name!r}" if name else what, leaf, pictures=what == "inputs")
        counts = {len(leaf) for leaf in leaves((self.inputs, self.targets))}
        if len(counts) != 1:
            expected = f"{self.count} targets, one per input" if self.count else "tensors of as many samples each"
            raise InputError("targets", expected, " and ".join(map(str, sorted(counts))), "give each sample a target")

    def __len__(self) -> int:
        return self.count

    @property
    def count(self) -> int:
        return len(leaves(self.inputs)[0]) if leaves(self.inputs) else 0

    @property
    def labels(self) -> Int64[Tensor, " N"]:
        """The targets, where they are a class number per sample. Raises InputError where they are something else."""
        return class_numbers(self.targets)

    @property
    def sample_shape(self) -> Any:
        """The shape of one input, without the batch; of several inputs the same nesting of shapes."""
        return map_leaves(lambda leaf: tuple(leaf.shape[1:]), self.inputs)

    def kinds(self) -> tuple[str, str]:
        """What one input is, and what one target is, in words that two sites can compare."""
        return described(self.inputs), described(self.targets)

    def take(self, indices: Int64[Tensor, " M"]) -> "Samples":
        """A copy of the samples that `indices` number, in that order."""
        inputs, targets = map_leaves(lambda leaf: leaf[indices], (self.inputs, self.targets))
        return Samples(inputs, targets)  # this indexing keeps channels last in memory

    def to(self, device: torch.device) -> "Samples":
        """The samples on `device`, where batches are then drawn and augmented too; as they are where that is a GPU and
        they would take more than a quarter of its free memory."""
        nbytes = sum(leaf.nbytes for leaf in leaves(self.inputs))
        if device.type == "cuda" and 4 * nbytes > torch.cuda.mem_get_info(device)[0]:
            return self
        inputs, targets = map_leaves(lambda leaf: leaf.to(device), (self.inputs, self.targets))
        return Samples(inputs, targets)


def _check_leaf(place: str, leaf: Tensor, *, pictures: bool) -> None:
    picture = pictures and leaf.dtype == torch.uint8 and leaf.ndim == 4
    if leaf.ndim == 0 or not (picture or leaf.is_floating_point() or leaf.dtype in (torch.int64, torch.bool)):
        expected = "int64, bool or floating point (N, ...)"
        expected = f"uint8 (N, C, H, W), {expected}" if pictures else expected
        raise InputError(place, expected, f"{leaf.dtype} {tuple(leaf.shape)}", "convert them, samples first")


def class_numbers(targets: Tree) -> Int64[Tensor, " N"]:
    """`targets`, where they are (N,) of int64. Raises InputError where they are something else."""
    if isinstance(targets, Tensor) and targets.dtype == torch.int64 and targets.ndim == 1:
        return targets
    raise InputError("targets", "int64 (), a class per sample", described(targets), "give class numbers")


def described(tree: Tree) -> str:
    """dtype and shape of one sample: `uint8 (3, 32, 32)`, or `{a: int64 (5,), b: float32 ()}`."""
    parts = {
        name: f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape[1:])}"
        for name, leaf in flatten(tree).items()
    }
    return parts[""] if set(parts) == {""} else f"{{{', '.join(f'{name}: {kind}' for name, kind in parts.items())}}}"


def is_pictures(leaf: Tensor) -> bool:
    return leaf.dtype == torch.uint8 and leaf.ndim == 4


# --- Drawn when they are due ------------------------------------------------------------------------------------------


@runtime_checkable
class Items(Protocol):
    """Samples by number, each drawn anew at every call: (inputs, targets) without the samples' dimension."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tree, Tree]: ...


class Stream(Samples):
    """Samples that are drawn one by one when their batch is due, because they do not fit into memory, or are others in
    every epoch. `inputs`, `targets` and `labels` draw them all, as often as they are asked for.

    What a sample draws at random depends on its number and on the seeds that `batches.py` gives, not on what was drawn
    before: see `seeded`.
    """

    def __init__(
        self, items: Items, indices: Int64[Tensor, " N"], workers: int = 0, known: Tree | None = None
    ) -> None:
        """`indices` of `items`, in that order; `workers` processes draw them. `known` are all items' targets, where
        they are known without drawing."""
        for name, value in (("items", items), ("indices", indices), ("workers", workers), ("known", known)):
            object.__setattr__(self, name, value)
        self.items: Items
        self.indices: Tensor
        self.workers: int
        self.known: Tree | None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def count(self) -> int:
        return len(self.indices)

    @property
    def inputs(self) -> Tree:  # type: ignore[override]
        return self.in_memory().inputs

    @property
    def targets(self) -> Tree:  # type: ignore[override]
        if self.known is not None:
            return map_leaves(lambda leaf: leaf[self.indices], self.known)
        return stack([draw(self.items, index)[1] for index in self.indices.tolist()])

    @property
    def sample_shape(self) -> Any:
        return self.take(torch.arange(1)).in_memory().sample_shape

    def kinds(self) -> tuple[str, str]:
        return self.take(torch.arange(1)).in_memory().kinds()

    def take(self, indices: Int64[Tensor, " M"]) -> "Stream":
        return Stream(self.items, self.indices[indices], self.workers, self.known)

    def to(self, device: torch.device) -> "Stream":
        return self

    def in_memory(self) -> Samples:
        """All of them, in memory, each drawn as for a test."""
        return stacked([draw(self.items, index) for index in self.indices.tolist()])


def draw(items: Items, index: int, *stream: int | str) -> tuple[Tree, Tree]:
    """One sample; what it draws at random depends on `stream` and `index` alone."""
    with undisturbed():
        return drawn(items, index, *stream)


def drawn(items: Items, index: int, *stream: int | str) -> tuple[Tree, Tree]:
    """`draw`, which leaves the global generators as it used them."""
    reseed(derive_seed("sample", *stream, index))
    return items[index]


def stacked(samples: list[tuple[Tree, Tree]]) -> Samples:
    inputs, targets = stack([inputs for inputs, _ in samples]), stack([targets for _, targets in samples])
    return Samples(map_leaves(fast_layout, inputs), targets)


def fast_layout(leaf: Tensor) -> Tensor:
    return leaf.contiguous(memory_format=torch.channels_last) if leaf.ndim == 4 else leaf


def stack(trees: list[Tree]) -> Tree:
    """Samples' trees of the same nesting → one of tensors with the samples first."""
    columns = zip(*(leaves(tree) for tree in trees), strict=True)
    tensors = iter([torch.stack(column) for column in columns])
    return map_leaves(lambda _: next(tensors), trees[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """PyTorch's, NumPy's and Python's global generators start from `seed`; behind it they are as they were before."""
    with undisturbed():
        reseed(seed)
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """What is drawn inside changes nothing outside."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def reseed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def array_generators() -> tuple[bytes, bytes, object]:
    """The state of PyTorch's and NumPy's global generators, to be compared."""
    numpy_state: Any = np.random.get_state()
    return bytes(torch.get_rng_state().numpy()), bytes(numpy_state[1]), numpy_state[2:]


# --- A data set -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Dataset:
    """What one name stands for. Raises InputError for an empty or unequal split, a label or a value out of range."""

    name: str
    train: Samples
    test: Samples
    classes: int  # or labels, target columns, tokens: what the targets let expect of a network
    mean: tuple[float, ...]  # per channel of uint8 inputs, of inputs / 255; others are taken as they are
    std: tuple[float, ...]
    crop_padding: int | None = None  # pixels; in training, random crop and horizontal flip; None: neither
    names: tuple[str, ...] = ()  # of the classes or target columns, in order, where they are known
    notes: tuple[str, ...] = ()  # one line each, for whoever loads it
    sites: tuple[tuple[str, Any], ...] = ()  # further (name, JSON value) in which sites must agree
    scales: tuple[tuple[str, Any], ...] = ()  # likewise, of how inputs were normalized when they were read

    def __post_init__(self) -> None:
        for part, split in (("train", self.train), ("test", self.test)):
            _check_samples(f"data {self.name}, {part}", split, self.classes)
        kinds = [split.kinds()[0] for split in (self.train, self.test)]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"data {self.name}", f"test samples like the training samples, {kinds[0]}", kinds[1],
                "convert both alike",
            )
        _check_statistics(self)

    def agreement(self, *, shared: bool, normalization: bool = True) -> dict[str, Any]:
        """What clients must have alike, by readable name, as JSON has it; what is learned would mean something else at
        each site otherwise. `shared`: the samples too, which the clients deal out among themselves; else each site has
        its own. `normalization`: by the same mean and deviation."""
        inputs, targets = self.train.kinds()
        agreed: dict[str, Any] = {"inputs": inputs, "targets": targets, "class names": list(self.names)}
        agreed |= dict(self.sites)
        if normalization:
            agreed |= {"mean": list(self.mean), "std": list(self.std), **dict(self.scales)}
        if shared:
            agreed |= {"training samples (digest)": digest(self.train), "test samples (digest)": digest(self.test)}
        return agreed


def _check_samples(place: str, samples: Samples, classes: int) -> None:
    if len(samples) == 0:
        raise InputError(place, "at least one sample", "none", "give samples to both splits")
    if isinstance(samples, Stream):
        return  # each is checked when it is drawn
    check_classes(place, samples.targets, classes)
    for name, leaf in flatten(samples.inputs).items():
        if leaf.is_floating_point():
            broken = ~leaf.isfinite().reshape(len(samples), -1).all(1)
            if broken.any():
                what = f"input {int(broken.nonzero()[0])}" + (f", {name!r}" if name else "")
                raise InputError(f"{place}, {what}", "finite values", "NaN or infinity", "mend or remove it")


def check_classes(place: str, targets: Tree, classes: int) -> None:
    """Raises InputError for a class number that is too large, where targets are class numbers. Below 0 is what marks
    samples without a label, where the task has such."""
    if not (isinstance(targets, Tensor) and targets.dtype == torch.int64 and targets.ndim == 1):
        return
    outside = targets >= classes
    if outside.any():
        i = int(outside.nonzero()[0])
        raise InputError(
            f"{place}, label {i}", f"a class in 0..{classes - 1}", f"{int(targets[i])}",
            "number the classes from 0",
        )


def _check_statistics(data: Dataset) -> None:
    first = data.train.take(torch.arange(1)).inputs
    channels = sum(leaf.shape[1] for leaf in leaves(first) if is_pictures(leaf))
    if not len(data.mean) == len(data.std) == channels or any(std <= 0 for std in data.std):
        raise InputError(
            f"data {data.name}, mean and std", f"{channels} of each, std above 0", f"{data.mean} and {data.std}",
            "give one per channel to uint8 inputs, none to floating point",
        )
    padding = data.crop_padding
    if padding is not None:
        shape = tuple(first.shape[1:]) if isinstance(first, Tensor) else data.train.sample_shape
        if not (isinstance(first, Tensor) and len(shape) == 3 and 0 <= padding < min(shape[1:])):
            expected = "pictures (C, H, W), with a margin less than their height and width"
            raise InputError(f"data {data.name}", expected, f"{shape} with {padding}", "change data.crop_padding")


# --- What data sets are compared by -----------------------------------------------------------------------------------

PROBES = 64  # of samples that are drawn when they are due


def digest(samples: Samples) -> str:
    """A digest of the samples and their order; of a stream, of some of them that are spread over it."""
    if isinstance(samples, Stream):
        some = torch.linspace(0, len(samples) - 1, min(PROBES, len(samples))).long()
        return f"{digest(samples.take(some).in_memory())} of {len(some)} of {len(samples)}"
    hashed = hashlib.blake2b(repr((len(samples), samples.kinds())).encode(), digest_size=8)
    for leaf in leaves((samples.inputs, samples.targets)):
        for part in leaf.split(1024):  # a copy in the order of the indices, whatever the memory's order is
            hashed.update(as_bytes(part))
    return hashed.hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def overlap(train: Samples, test: Samples) -> int:
    """How many of the test samples have the inputs of a training sample, bit for bit. Both are in memory."""
    seen = set(_fingerprints(train))
    return sum(fingerprint in seen for fingerprint in _fingerprints(test))


def _fingerprints(samples: Samples) -> Iterator[int]:
    for part in torch.arange(len(samples)).split(1024):
        columns = [leaf[part].flatten(1) if leaf.ndim > 1 else leaf[part, None] for leaf in leaves(samples.inputs)]
        rows = [column.contiguous().view(torch.uint8).numpy() for column in columns]
        yield from (hash(tuple(row.tobytes() for row in each)) for each in zip(*rows, strict=True))


def with_statistics(
    name: str, train: Samples, test: Samples, classes: int, names: tuple[str, ...] = (), **more: Any
) -> Dataset:
    """A data set whose uint8 inputs are normalized by the training samples' own mean and deviation, per channel."""
    some = train
    if isinstance(train, Stream):
        pictures = any(map(is_pictures, leaves(train.take(torch.arange(1)).inputs))) if len(train) else False
        some = train.take(torch.linspace(0, len(train) - 1, min(1024, len(train)) if pictures else 1).long())
    inputs = some.inputs
    statistics = [pair for leaf in leaves(inputs) if is_pictures(leaf) for pair in channel_statistics(leaf)]
    mean, std = tuple(mean for mean, _ in statistics), tuple(std for _, std in statistics)
    return Dataset(name, train, test, classes, mean, std, names=names, **more)


def channel_statistics(pictures: Tensor) -> Iterator[tuple[float, float]]:
    """(mean, deviation) of each channel / 255."""
    values = torch.arange(256, dtype=torch.float64) / 255
    for channel in pictures.unbind(1):  # (N, H, W); counted, because a copy as floating point is 4 to 8 × larger
        share = channel.flatten().bincount(minlength=256) / channel.numel()
        mean = float(share.double() @ values)
        deviation = float(share.double() @ (values - mean) ** 2) ** 0.5
        yield mean, max(deviation, 1 / 255)  # a constant channel has 0


def outputs(train: Samples, test: Samples, names: tuple[str, ...]) -> int:
    """How many classes, labels or target columns there are: as many as names, else what the targets show."""
    return len(names) or max(_outputs(part) for part in (train, test))


def _outputs(samples: Samples) -> int:
    if len(samples) == 0:
        return 0
    target = leaves(samples.targets)[0]
    if target.dtype == torch.int64:
        return max(int(target.max()) + 1, 1)
    return target.shape[1] if target.ndim > 1 else 1


def with_note(data: Dataset, *notes: str) -> Dataset:
    return replace(data, notes=data.notes + notes)

