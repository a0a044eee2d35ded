"""Many messages as one piece of bytes: what a round has a client do, and all that it would have said meanwhile.

For engines that carry one message to a client and one reply back (`run/round_hub.py`). Little-endian: the magic word,
the protocol's number, the round's, the run's name in 16 characters, then each message behind its length.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from halfpass.errors import InputError
from halfpass.wire.messages import PROTOCOL

_HEAD = struct.Struct("<8sIQ16s")
_LENGTH = struct.Struct("<Q")
_MAGIC = b"halfpass"
NO_RUN = " " * 16


@dataclass(frozen=True)
class Frames:
    """What was packed; `messages` are not copied."""

    number: int
    run: str
    messages: Sequence[memoryview]


def pack(number: int, run: str, messages: Iterable[bytes | memoryview]) -> bytes:
    """`run` has 16 ASCII characters."""
    parts: list[bytes | memoryview] = [_HEAD.pack(_MAGIC, PROTOCOL, number, run.encode("ascii"))]
    for message in messages:
        parts += [_LENGTH.pack(len(message)), message]
    return b"".join(parts)


def unpack(place: str, data: bytes, most: int) -> Frames:
    """The inverse of `pack`. Raises InputError for anything else, and for more than `most` messages."""
    remedy = "both sides must run the same halfpass"
    if len(data) < _HEAD.size:
        raise InputError(place, "the messages of a round", f"{len(data)} bytes", remedy)
    magic, protocol, number, run = _HEAD.unpack_from(data)
    if magic != _MAGIC or not run.isascii():
        raise InputError(place, "the messages of a round", "other bytes", remedy)
    if protocol != PROTOCOL:
        raise InputError(place, f"protocol {PROTOCOL}", f"{protocol}", remedy)
    at, messages, whole = _HEAD.size, list[memoryview](), memoryview(data)
    while at < len(data):
        if len(messages) == most:
            raise InputError(place, f"at most {most} messages in a round", "more", "both sides need the same settings")
        if len(data) - at < _LENGTH.size:
            break
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        messages.append(whole[at : at + length])
        at += length
    if at != len(data):
        raise InputError(place, "whole messages", "one that is cut short", "send it again")
    return Frames(number, run.decode(), messages)
