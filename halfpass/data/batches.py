"""Samples → normalized batches, shuffled and, for training pictures, cropped and flipped. Only this file knows whether
samples are in memory or drawn when their batch is due.

Pictures stay uint8 until their batch is due; crop, flip and normalization then run on the whole batch, on the samples'
device. What is random is drawn on the CPU, each from a stream of its own, so it is the same on any device. Check:
`pytest tests/test_data.py`.
"""

from collections.abc import Iterator, Sequence
from pickle import PicklingError
from typing import Any

import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader

from halfpass.data.samples import Dataset, Samples, Stream, check_classes, draw, drawn, stacked, undisturbed
from halfpass.data.workers import end_with_parent
from halfpass.errors import InputError, reason
from halfpass.seed import derive_seed
from halfpass.tree import Tree, leaves, map_leaves


def batch_count(samples: int, batch_size: int) -> int:
    """How many batches `train_batches` gives in an epoch: at least one, of whatever samples there are. Raises
    InputError where there is not even that."""
    if batch_size < 1:
        raise InputError("train.batch_size", "at least 1", f"{batch_size}", "128 is usual")
    full, rest = divmod(samples, batch_size)
    if full == 0 and rest < 2:
        expected = "at least 2 training samples, or batches of 1"
        raise InputError("train.batch_size", expected, f"{samples} with batches of {batch_size}", "give more samples")
    return full + (rest > 1)  # BatchNorm cannot normalize one value per channel, so a single one sits this epoch out


def micro_batches(samples: int, size: int | None) -> list[slice]:
    """The slices of a batch of `samples` that are computed one after the other: as few as can be, of at most `size`
    samples, and as even as can be, so that none is left with a single sample that BatchNorm cannot normalize."""
    count = 1 if size is None else -(-samples // size)
    ends = [samples * (i + 1) // count for i in range(count)]
    return [slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def train_batches(
    data: Dataset, samples: Samples, batch_size: int, *, seed: int, client: int, epoch: int, first: int = 0
) -> Iterator[tuple[Any, Any]]:
    """One epoch of `samples`, a part of `data.train`, shuffled and, where `data` says so, cropped and flipped; from its
    batch `first` on.

    Yields inputs and targets, nested as the samples' are: of uint8 pictures (B, C, H, W) float32, normalized, in
    channels-last memory; other floating point as float32, integers and bool as they are.
    The last batch may be smaller, never a single sample. The order and all that is drawn at random depend on `seed`,
    `client` and `epoch` only. Raises InputError at the call where there is no batch.
    """
    count = batch_count(len(samples), batch_size)
    batches = torch.randperm(len(samples), generator=_generator(seed, "order", client, epoch)).split(batch_size)[:count]
    draws = None if data.crop_padding is None else _generator(seed, "augment", client, epoch)
    if isinstance(samples, Stream):
        return _streamed(data, samples, batches[first:], (seed, client, epoch))
    if draws is not None and data.crop_padding is not None:
        for indices in batches[:first]:
            draw_crop_and_flip(len(indices), data.crop_padding, draws)
    return (_batch(data, samples, indices, draws) for indices in batches[first:])


def test_batches(data: Dataset, samples: Samples, batch_size: int) -> Iterator[tuple[Any, Any]]:
    """All of `samples` in their order, not augmented, shaped as in `train_batches`; the last batch may be any size."""
    if batch_size < 1:
        raise InputError("test batch size", "at least 1", f"{batch_size}", "256 is usual")
    batches = torch.arange(len(samples)).split(batch_size)
    if isinstance(samples, Stream):
        return _streamed(data, samples, batches, ())
    return (_batch(data, samples, indices, None) for indices in batches)


test_batches.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it for its name


def _generator(seed: int, stream: str, client: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, stream, client, epoch))


def _batch(data: Dataset, samples: Samples, indices: Tensor, draws: torch.Generator | None) -> tuple[Any, Any]:
    device = leaves(samples.inputs)[0].device
    indices = indices.to(device)
    inputs = map_leaves(lambda leaf: _channels_behind(leaf).index_select(0, indices), samples.inputs)
    if draws is not None and data.crop_padding is not None:  # of one input
        moves = draw_crop_and_flip(len(inputs), data.crop_padding, draws)
        inputs = crop_and_flip(inputs, *(move.to(device) for move in moves))
    targets = map_leaves(lambda leaf: leaf[indices], samples.targets)
    return _normalized(data.mean, data.std, inputs, samples.inputs), targets


def _channels_behind(leaf: Tensor) -> Tensor:
    """(N, C, H, W) → (N, H, W, C), a view that a copy is fastest of; others as they are."""
    return leaf.permute(0, 2, 3, 1) if leaf.ndim == 4 else leaf


def as_network_inputs(inputs: Tree, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """A batch of raw inputs as the network gets them: uint8 pictures normalized, all else as it is."""
    return _normalized(mean, std, map_leaves(lambda leaf: _channels_behind(leaf).contiguous(), inputs), inputs)


def _normalized(mean: tuple[float, ...], std: tuple[float, ...], inputs: Tree, like: Tree) -> Any:
    """Floating point of what was taken from `like`, its channels behind; the channels before them again."""
    first, made = 0, []
    for x, whole in zip(leaves(inputs), leaves(like), strict=True):
        if whole.dtype == torch.uint8:  # pictures
            last = first + whole.shape[1]
            x = normalize(x, mean[first:last], std[first:last])
            first = last
        elif whole.is_floating_point():
            x = x.to(torch.float32)
        made.append(x.permute(0, 3, 1, 2) if whole.ndim == 4 else x)
    tensors = iter(made)
    return map_leaves(lambda _: next(tensors), inputs)


class _Drawn:
    """For a DataLoader: samples by number, drawn under the seeds of one epoch, or why they cannot be."""

    def __init__(self, samples: Stream, seeds: tuple[int, ...]) -> None:
        self.samples, self.seeds, self.numbers = samples, seeds, samples.indices.tolist()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[Tree, Tree]:
        return draw(self.samples.items, self.numbers[i], *self.seeds)

    def __getitems__(self, batch: list[int]) -> list[tuple[Tree, Tree]] | list[InputError]:
        try:
            with undisturbed():
                return [drawn(self.samples.items, self.numbers[i], *self.seeds) for i in batch]
        except InputError as error:  # a worker would hand it on as another one
            return [error]


def _streamed(
    data: Dataset, samples: Stream, batches: Sequence[Tensor], seeds: tuple[int, ...]
) -> Iterator[tuple[Any, Any]]:
    """Batches that are drawn when they are due, in the samples' workers."""
    loader: DataLoader[Any] = DataLoader(
        _Drawn(samples, seeds), batch_sampler=[batch.tolist() for batch in batches], num_workers=samples.workers,  # type: ignore[arg-type]
        collate_fn=list, generator=torch.Generator(), worker_init_fn=end_with_parent,
    )  # fmt: skip
    for taken in _started(data, loader):
        if isinstance(taken[0], InputError):
            raise taken[0]
        batch = stacked(taken)
        check_classes(f"data {data.name}, a batch", batch.targets, data.classes)
        yield as_network_inputs(batch.inputs, data.mean, data.std), batch.targets


def _started(data: Dataset, loader: "DataLoader[Any]") -> Iterator[Any]:
    try:
        return iter(loader)
    except (PicklingError, AttributeError, TypeError) as error:  # where workers are not forked from this process
        expected, remedy = "a data set that can be sent to its workers", "no lambda or local class in it, or no workers"
        raise InputError(f"data {data.name}", expected, reason(error), remedy) from error


def draw_crop_and_flip(count: int, padding: int, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `count` pictures: the crop's top and left in the picture, -padding..padding pixels, and whether it is
    mirrored."""
    top, left = torch.randint(-padding, padding + 1, (2, count), generator=draws)
    return top, left, torch.rand(count, generator=draws) < 0.5


def crop_and_flip(
    pixels: UInt8[Tensor, "B H W C"], top: Int64[Tensor, " B"], left: Int64[Tensor, " B"], flip: Bool[Tensor, " B"]
) -> UInt8[Tensor, "B H W C"]:
    """Each picture is moved by (top, left), what that leaves open filled by reflection at its border pixels, then
    mirrored left to right where `flip`.

    The crop of He et al. 2015, section 4.2, whose margin is black.
    """
    batch, height, width, channels = pixels.shape
    ahead = torch.arange(width, device=pixels.device)
    rows = _reflected(top[:, None] + torch.arange(height, device=pixels.device), height)  # (B, H)
    columns = _reflected(left[:, None] + torch.where(flip[:, None], ahead.flip(0), ahead), width)  # (B, W)
    rows = rows + torch.arange(batch, device=pixels.device)[:, None] * height  # counted through the whole batch
    places = rows[:, :, None] * width + columns[:, None, :]  # (B, H, W)
    # One gather of whole pixels does crop and flip; indexing the four dimensions does the same four times as slowly.
    return pixels.contiguous().view(-1, channels).index_select(0, places.flatten()).view_as(pixels)


def _reflected(places: Tensor, size: int) -> Tensor:
    """Places less than `size` outside 0..size-1, reflected into it."""
    return (size - 1) - ((size - 1) - places.abs()).abs()


def normalize(
    pixels: UInt8[Tensor, "B H W C"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float32[Tensor, "B H W C"]:
    """(pixels / 255 - mean) / std, per channel, as one multiplication and one addition."""
    means, stds = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    width = pixels.shape[2]
    scale, shift = (  # (W * C,)
        per_channel.float().repeat(width).to(pixels.device) for per_channel in (1 / (255 * stds), -means / stds)
    )
    rows = pixels.to(torch.float32).flatten(2)  # (B, H, W * C): long rows, because loops over 3 channels are slow
    return rows.mul_(scale).add_(shift).view(pixels.shape)
