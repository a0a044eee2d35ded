"""Tensor ↔ bytes: a table of named pairs, each with a stated error bound.

A codec sees a dense tensor as rows (R, C) in its storage order and writes the values back into rows of the same dtype;
shape and order travel beside the bytes (`messages.py`). `none` is exact for every dtype. Lossy codecs hold floating
point values only, and refuse NaN, infinity and what is too large, with the place.

`int8`, `int4` and `int2` take C for channels, each with a lowest level `lo` and a `step` of its own, 8 bytes in all. A
channel whose smallest value is 0, as a ReLU's are, has lo = 0 exactly, and zeros decode to exactly 0.

int8 spreads 256 levels evenly over the channel's range. Four or sixteen are too few for that: activations are dense
near 0, and the largest is ten times their mean. So int4 and int2 take the step from s = E[d²] / E[|d|], where d is the
distance from 0 in ReLU channels and from the mean in others; unlike the standard deviation, s does not change when more
values are 0. Levels grow apart with the distance: level k lies at step · k / (1 - bend · k), and values beyond the last
level become that level. `CODECS` has steps and bends near the least mean squared error on activations of ResNet-20:
three tenths (int2) and less than half (int4) of what levels spread evenly over the range have
(`benchmarks/codecs.py`). The price: of a channel with a few huge values among many tiny ones, the huge ones are lost.

With `+zstd` those bytes are compressed. Codes of neighbouring rows, which are pixels, share a byte: they are more alike
than those of neighbouring channels, and the result is a tenth smaller.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
import zstandard
from torch import Tensor

from halfpass.errors import InputError, RunError

Encode = Callable[[Tensor], bytes]
Decode = Callable[[bytes, Tensor], None]
Size = Callable[[int, int, torch.dtype], int]
Place = TypeVar("Place", float, Tensor)

ZSTD_LEVEL = 1  # higher ones take longer, and compress packed codes less


@dataclass(frozen=True)
class Codec:
    """The bound: |decoded - x| ≤ of_range · (max - min of x's channel) + relative · |x| + absolute, for float32 x that
    the codec does not refuse. Values of a narrower dtype are rounded to it besides. of_range = 1 says that values may
    be cut off: each stays within its channel's range, and what is small is the mean squared error.
    """

    name: str
    write: Encode  # (R, C) dense → bytes, not compressed
    read: Decode  # those bytes into (R, C) dense
    size: Size  # R, C, dtype → the number of those bytes
    relative: float = 0.0
    absolute: float = 0.0
    of_range: float = 0.0
    per_channel: bool = False  # C must be the channels, whatever the tensor's storage order was
    zstd: bool = False

    @property
    def exact(self) -> bool:
        return self.relative == self.absolute == self.of_range == 0

    def encode(self, values: Tensor) -> bytes:
        """(R, C), dense → bytes."""
        if not (self.exact or values.is_floating_point()):
            raise InputError(f"codec {self.name}", "floating point values", f"{values.dtype}", "use codec none")
        data = self.write(values)
        return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(data) if self.zstd else data

    def check_size(self, data: bytes, rows: int, channels: int, dtype: torch.dtype) -> None:
        """Raises ValueError unless `data` are (rows, channels) values: before memory for them is allocated."""
        expected = self.size(rows, channels, dtype)
        found = _frame_size(data) if self.zstd else len(data)
        if found != expected or not (self.exact or dtype.is_floating_point):
            raise ValueError(f"{expected} bytes expected for {rows} × {channels} {dtype}, {found} found")

    def decode(self, data: bytes, out: Tensor) -> None:
        """Writes the values into `out` (R, C), dense. Raises ValueError where `data` are not such values."""
        rows, channels = out.shape
        self.check_size(data, rows, channels, out.dtype)
        if self.zstd:
            try:
                data = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
            except zstandard.ZstdError as error:
                raise ValueError(f"not zstd: {error}") from None
        self.read(data, out)


def _frame_size(data: bytes) -> int:
    """Bytes that a zstd frame says it holds, -1 where it does not say or is none.

    zstandard allocates so many, whatever its `max_output_size`: a bomb must be seen here.
    """
    try:
        return zstandard.frame_content_size(data)
    except zstandard.ZstdError:
        return -1


# --- Casts ------------------------------------------------------------------------------------------------------------


def _memory(values: Tensor) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """The raw little-endian memory of a dense CPU tensor, shared."""
    return values.view(-1).view(torch.uint8).numpy()


def _to_bytes(values: Tensor) -> bytes:
    return _memory(values).tobytes()


def _copy_bytes(data: bytes, out: Tensor) -> None:
    _memory(out)[:] = np.frombuffer(data, np.uint8)


def _cast(name: str, narrow: torch.dtype, relative: float, absolute: float) -> Codec:
    def write(values: Tensor) -> bytes:
        small = values.to(narrow)
        if values.numel() and not torch.stack(values.aminmax()).to(narrow).isfinite().all():  # NaN is both extremes
            raise _refusal(name, values, ~torch.isfinite(small), torch.finfo(narrow).max)
        return _to_bytes(small)

    def read(data: bytes, out: Tensor) -> None:
        small = torch.empty(out.shape, dtype=narrow)
        _copy_bytes(data, small)
        out.copy_(small)

    def size(rows: int, channels: int, _: torch.dtype) -> int:
        return rows * channels * narrow.itemsize

    return Codec(name, write, read, size, relative, absolute)


def _refusal(name: str, values: Tensor, wrong: Tensor, largest: float) -> RunError:
    """Names the first place where `wrong`."""
    place = int(wrong.view(-1).nonzero()[0])
    return RunError(
        f"codec {name}, value {place}", f"finite values within ±{largest:g}", f"{values.view(-1)[place].item():g}",
        "train with a lower learning rate, or use codec none",
    )  # fmt: skip


# --- Integers ---------------------------------------------------------------------------------------------------------

LARGEST = 2.0**126  # of integer codecs: no difference of two values overflows float32
SMALLEST_STEP = 2.0**-126  # its inverse does not overflow either
BLOCK = 2**15 - 1
"""Values that are worked on at a time: they stay in the cache, and torch keeps to the calling thread. More threads gain
little, and where the cores are busy training, every operation would wait for the slowest."""


@dataclass(frozen=True)
class Levels:
    """Where the codes of an integer codec lie."""

    bits: int
    relu: float = math.inf  # first step in units of s; never more than spreads the levels over the range
    other: float = math.inf  # the same for channels that are not a ReLU's
    bend: float = 0.0

    @property
    def top(self) -> int:
        """The last code."""
        return 2**self.bits - 1

    def at(self, place: Place) -> Place:
        """Distance of a level from the middle in steps, by the distance of their codes."""
        return place / (1 - self.bend * place)

    def middle(self, lo: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Of each channel (C,), the code from which levels grow apart, and its value: code 0 where it is a ReLU's."""
        code = torch.where(lo == 0, 0.0, self.top / 2 if self.bend else 0.0)
        return code, lo + step * self.at(code)


def _integer(name: str, levels: Levels, of_range: float) -> Codec:
    def write(values: Tensor) -> bytes:
        if values.numel() == 0:
            return b""
        values = values.float() if values.dtype == torch.float64 else values
        lo, step = _scales(name, values, levels)
        packed = _pack(_quantize(values, lo, step, levels), levels.bits)
        return _to_bytes(torch.stack((lo, step))) + _to_bytes(packed)

    def read(data: bytes, out: Tensor) -> None:
        if out.numel() == 0:
            return
        rows, channels = out.shape
        scales = np.frombuffer(data, np.float32, 2 * channels).copy()
        lo, step = torch.from_numpy(scales).view(2, channels)
        if not (torch.isfinite(lo) & torch.isfinite(lo + step * levels.at(levels.top))).all():
            raise ValueError("scales that are not finite")
        packed = torch.from_numpy(np.frombuffer(data, np.uint8, offset=scales.nbytes).copy()).view(-1, channels)
        _dequantize(_unpack(packed, levels.bits)[:rows], lo, step, levels, out)

    def size(rows: int, channels: int, _: torch.dtype) -> int:
        return channels * (8 + math.ceil(rows * levels.bits / 8)) if rows else 0

    return Codec(name, write, read, size, relative=2.0**-22, absolute=2.0**-126, of_range=of_range, per_channel=True)


def _wide(rows: Tensor) -> Tensor:
    """(R, C) → (R / k, k · C), a view of about a thousand columns: loops over a few channels are slow."""
    count, channels = rows.shape
    k = math.gcd(count, 1 << max(0, 11 - channels.bit_length()))
    return rows.view(-1, k * channels)


def _blocks(rows: Tensor, columns: int) -> tuple[Tensor, ...]:
    return rows.split(max(1, BLOCK // columns))


def _scales(name: str, values: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Lowest level and step of each channel, (C,) each, of values (R, C)."""
    wide, channels = _wide(values), values.shape[1]
    least, most = wide[0].clone(), wide[0].clone()  # (k · C,)
    for block in _blocks(wide, len(least)):
        torch.minimum(least, block.amin(0), out=least)
        torch.maximum(most, block.amax(0), out=most)
    lo, hi = least.view(-1, channels).amin(0).float(), most.view(-1, channels).amax(0).float()
    if not ((lo >= -LARGEST) & (hi <= LARGEST)).all():  # NaN is neither
        raise _refusal(name, values, ~(values.float().abs() <= LARGEST), LARGEST)
    relu = lo == 0
    if not levels.bend:
        return torch.where(relu, 0.0, lo), ((hi - lo) / levels.top).clamp_min(SMALLEST_STEP)
    mean, s = _moments(values, relu, torch.maximum(hi, -lo).clamp_min(SMALLEST_STEP))
    reach = torch.where(relu, levels.at(levels.top), 2 * levels.at(levels.top / 2))  # of all levels, in steps
    step = torch.minimum((hi - lo) / reach, s * torch.where(relu, levels.relu, levels.other)).clamp_min(SMALLEST_STEP)
    low = torch.maximum(lo, torch.minimum(mean - reach / 2 * step, hi - reach * step))
    return torch.where(relu, 0.0, low), step


def _moments(values: Tensor, relu: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, 0 where `relu`, and s = E[d²] / E[|d|] of d = values - mean, (C,) each, by channel.

    `peak` (C,) is the largest magnitude: of values / peak no square overflows.
    """
    wide, channels = _wide(values), values.shape[1]
    columns = wide.shape[1]
    scale, mean = (1 / peak).repeat(columns // channels), torch.zeros(channels)
    total, size, square = torch.zeros(3, columns)
    if not relu.all():
        for block in _blocks(wide, columns):
            total += (block * scale).sum(0)
        mean = torch.where(relu, 0.0, total.view(-1, channels).sum(0) / len(values))
    center = mean.repeat(columns // channels)
    for block in _blocks(wide, columns):
        d = block * scale
        if not relu.all():
            d.sub_(center).abs_()
        size += d.sum(0)
        square += d.square_().sum(0)
    s = square.view(-1, channels).sum(0) / size.view(-1, channels).sum(0)
    return mean * peak, s.nan_to_num(0.0) * peak  # 0 / 0 where a channel is constant


def _quantize(values: Tensor, lo: Tensor, step: Tensor, levels: Levels) -> Tensor:
    """(R, C) codes, uint8, of the levels nearest in code."""
    wide = _wide(values)
    codes, columns = torch.empty(wide.shape, dtype=torch.uint8), wide.shape[1]
    code, middle, inverse = (row.repeat(columns // len(row)) for row in (*levels.middle(lo, step), 1 / step))
    half, one, shifted, signed = code + 0.5, torch.tensor(1.0), bool(middle.any()), bool(code.any())
    for block, target in zip(_blocks(wide, columns), _blocks(codes, columns), strict=True):
        t = (block - middle).mul_(inverse) if shifted else block * inverse
        if levels.bend:
            t = torch.addcdiv(half, t, torch.add(one, t.abs() if signed else t, alpha=levels.bend))
        else:
            t.add_(half)
        target.copy_(t.clamp_(0, levels.top + 0.5).to(torch.int32))  # truncates; to uint8 at once is slower
    return codes.view(values.shape)


def _dequantize(codes: Tensor, lo: Tensor, step: Tensor, levels: Levels, out: Tensor) -> None:
    """The inverse of `_quantize`, into `out` (R, C)."""
    wide = _wide(out)
    columns = wide.shape[1]
    code, middle, steps = (row.repeat(columns // len(row)) for row in (*levels.middle(lo, step), step))
    one, signed = torch.tensor(1.0), bool(code.any())
    for block, target in zip(_blocks(codes.view(wide.shape), columns), _blocks(wide, columns), strict=True):
        t = block - code if signed else block.to(torch.float32)
        if levels.bend:
            t.div_(torch.sub(one, t.abs() if signed else t, alpha=levels.bend))
        target.copy_(torch.addcmul(middle, t, steps))


def _pack(codes: Tensor, bits: int) -> Tensor:
    """(R, C) codes → (R · bits / 8, C) bytes: those of neighbouring rows share a byte, the first in the low bits."""
    if bits == 8:
        return codes
    rows, channels = codes.shape
    share = 8 // bits
    if missing := -rows % share:
        codes = torch.cat((codes, codes.new_zeros(missing, channels)))
    groups = codes.view(-1, share, channels)
    packed = codes.new_empty(len(groups), channels)
    for group, target in zip(_blocks(groups, channels), _blocks(packed, channels), strict=True):
        torch.add(group[:, 0], group[:, 1], alpha=1 << bits, out=target)
        for i in range(2, share):
            target.add_(group[:, i], alpha=1 << i * bits)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack`, with its padding."""
    if bits == 8:
        return packed
    rows, channels = packed.shape
    codes = packed.new_empty(rows, 8 // bits, channels)
    for block, target in zip(_blocks(packed, channels), _blocks(codes, channels), strict=True):
        for i in range(8 // bits):
            torch.bitwise_and(block >> i * bits, (1 << bits) - 1, out=target[:, i])
    return codes.view(-1, channels)


# --- The table --------------------------------------------------------------------------------------------------------

_BASE = (
    Codec("none", _to_bytes, _copy_bytes, lambda rows, channels, dtype: rows * channels * dtype.itemsize),
    # fp16: 10 stored bits of mantissa, subnormals down to 2^-24. bf16: 7 bits, the exponents of float32.
    _cast("fp16", torch.float16, relative=2.0**-11, absolute=2.0**-25),
    _cast("bf16", torch.bfloat16, relative=2.0**-8, absolute=2.0**-134),
    _integer("int8", Levels(8), of_range=0.5 / 255 + 2**-20),
    _integer("int4", Levels(4, relu=0.11, other=0.22, bend=0.04), of_range=1.0),
    _integer("int2", Levels(2, relu=0.42, other=0.65, bend=0.1), of_range=1.0),
)
CODECS: dict[str, Codec] = {codec.name: codec for codec in _BASE}
CODECS |= {f"{name}+zstd": replace(codec, name=f"{name}+zstd", zstd=True) for name, codec in CODECS.items()}
