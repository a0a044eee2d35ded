"""Tensor ↔ bytes: a table of named pairs, each with a stated error bound.

A codec sees a dense tensor in its storage order and gives the values back in the same order and dtype; shape and order
travel beside the bytes (`messages.py`). `none` is exact for every floating point dtype. Lossy codecs refuse NaN,
infinity and what they cannot hold, with the place.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from halfpass.errors import RunError

Encode = Callable[[Tensor], bytes]
Decode = Callable[[bytes, torch.dtype], Tensor]


@dataclass(frozen=True)
class Codec:
    """`encode`: (N,) tensor → bytes; `decode`: bytes, dtype → (N,) tensor, writable, sharing no memory with the bytes.

    `bound`: |decoded - x| ≤ relative · |x| + absolute, for float32 x within the codec's range.
    """

    encode: Encode
    decode: Decode
    relative: float
    absolute: float


def to_bytes(values: Tensor) -> bytes:
    """The raw little-endian memory of a dense 1-D CPU tensor."""
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    """(N,) tensor of the memory in `data`, copied: what is read from a message is read-only."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _cast_pair(name: str, narrow: torch.dtype) -> tuple[Encode, Decode]:
    def encode(values: Tensor) -> bytes:
        small = values.to(narrow)
        finite = torch.isfinite(small)
        if not finite.all():
            place = int((~finite).nonzero()[0])
            raise RunError(
                f"codec {name}, value {place}", f"finite values within ±{torch.finfo(narrow).max:g}",
                f"{values[place].item():g}", "train with a lower learning rate, or use codec none",
            )
        return to_bytes(small)

    def decode(data: bytes, dtype: torch.dtype) -> Tensor:
        values = from_bytes(data, narrow)
        return values.to(dtype)

    return encode, decode


# fp16: 10 stored bits of mantissa, subnormals down to 2^-24. bf16: 7 bits, the exponents of float32.
CODECS: dict[str, Codec] = {
    "none": Codec(to_bytes, from_bytes, relative=0.0, absolute=0.0),
    "fp16": Codec(*_cast_pair("fp16", torch.float16), relative=2.0**-11, absolute=2.0**-25),
    "bf16": Codec(*_cast_pair("bf16", torch.bfloat16), relative=2.0**-8, absolute=2.0**-134),
}
