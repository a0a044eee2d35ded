"""Samples → normalized batches, shuffled and, for training pictures, cropped and flipped.

Pictures stay uint8 until their batch is due; crop, flip and normalization then run on the whole batch, on the samples'
device. What is random is drawn on the CPU, each from a stream of its own, so it is the same on any device. Check:
`pytest tests/test_data.py`.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor

from halfpass.data.datasets import Dataset, Samples
from halfpass.errors import InputError
from halfpass.seed import derive_seed


def batch_count(samples: int, batch_size: int) -> int:
    """How many batches `train_batches` gives in an epoch. Raises InputError where not even one is full."""
    if not 1 <= batch_size <= samples:
        raise InputError(
            "train.batch_size", f"1 to {samples}, because there are {samples} samples", f"{batch_size}",
            "take a smaller batch, or fewer clients so that each has more samples",
        )
    full, rest = divmod(samples, batch_size)
    return full + (rest > 1)  # BatchNorm cannot normalize one value per channel, so a single one sits this epoch out


def micro_batches(samples: int, size: int | None) -> list[slice]:
    """The slices of a batch of `samples` that are computed one after the other: as few as can be, of at most `size`
    samples, and as even as can be, so that none is left with a single sample that BatchNorm cannot normalize."""
    count = 1 if size is None else -(-samples // size)
    ends = [samples * (i + 1) // count for i in range(count)]
    return [slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def train_batches(
    data: Dataset, samples: Samples, batch_size: int, *, seed: int, client: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of `samples`, a part of `data.train`, shuffled and, where `data` says so, cropped and flipped.

    Yields x (B, C, H, W) float32, normalized, in channels-last memory (or (B, ...) float32 for other inputs, in which
    tokens up to 2²⁴ are exact), and y (B,) int64.
    The last batch may be smaller, never a single sample. The order and the augmentation depend on `seed`, `client` and
    `epoch` only. Raises InputError at the call where `batch_size` exceeds `samples`.
    """
    count = batch_count(len(samples), batch_size)
    order = torch.randperm(len(samples), generator=_generator(seed, "order", client, epoch))
    draws = None if data.crop_padding is None else _generator(seed, "augment", client, epoch)
    return (_batch(data, samples, indices, draws) for indices in order.split(batch_size)[:count])


def test_batches(data: Dataset, samples: Samples, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All of `samples` in their order, not augmented, shaped as in `train_batches`; the last batch may be any size."""
    if batch_size < 1:
        raise InputError("test batch size", "at least 1", f"{batch_size}", "256 is usual")
    return (_batch(data, samples, indices, None) for indices in torch.arange(len(samples)).split(batch_size))


test_batches.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it for its name


def _generator(seed: int, stream: str, client: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, stream, client, epoch))


def _batch(data: Dataset, samples: Samples, indices: Tensor, draws: torch.Generator | None) -> tuple[Tensor, Tensor]:
    pictures = samples.inputs.ndim == 4
    inputs = samples.inputs.permute(0, 2, 3, 1) if pictures else samples.inputs  # a view: (N, H, W, C)
    indices = indices.to(inputs.device)
    x = inputs.index_select(0, indices)  # always a copy, so that nothing done to a batch reaches the data
    if draws is not None and data.crop_padding is not None:
        x = crop_and_flip(x, *(t.to(x.device) for t in draw_crop_and_flip(len(x), data.crop_padding, draws)))
    x = normalize(x, data.mean, data.std) if data.mean else x.to(torch.float32)
    return (x.permute(0, 3, 1, 2) if pictures else x), samples.labels[indices]  # (B, C, H, W), (B,)


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
