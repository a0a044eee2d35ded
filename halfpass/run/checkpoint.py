"""Files that a run is gone on with from: a header, then what PyTorch saves, and a digest of all of it.

The one before is kept too, as `NAME.1`: what a damaged newest one falls back on. A file is read whole and compared with
its digest before anything of it is unpickled.
"""

import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from halfpass.bounded import parse_json
from halfpass.errors import InputError, RunError
from halfpass.files import replacing
from halfpass.wire.disk import sync

LOG = logging.getLogger("halfpass")
FORMAT = 1
_MAGIC = b"halfpass checkpoint\n"
_MOST_HEADER_BYTES = 2**20
_REMEDY = "restore it, or train anew"
SELDOM_SECONDS = 60.0  # until the same is said again
_said: dict[str, float] = {}  # what could not be kept, and until when that was said


def write(file: Path, run: str, state: Mapping[str, Any]) -> None:
    """Whole or not at all, and on the disk; what was there becomes the one before. Raises RunError where there is no
    room. `run` names what the state belongs to."""
    put(file, pack(run, state))


def pack(run: str, state: Mapping[str, Any]) -> list[bytes | memoryview]:
    """The parts of a file, for `put`: the state may change then."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getbuffer()
    header = {"format": FORMAT, "run": run, "bytes": len(content), "written": time.time()}
    head = _MAGIC + json.dumps(header).encode() + b"\n"
    digest = hashlib.blake2b(head)
    digest.update(content)
    return [head, content, digest.digest()]


def put(file: Path, parts: Sequence[bytes | memoryview]) -> None:
    """The second half of `write`."""
    with replacing(file) as partial:
        with partial.open("wb") as opened:
            for part in parts:
                opened.write(part)
            opened.flush()
            os.fsync(opened.fileno())
        if file.exists():
            file.replace(before(file))  # a process that is killed here has that one
    with suppress(OSError):  # some file systems have no such thing
        sync(file.parent)


def not_kept(error: RunError) -> None:
    """A checkpoint could not be written, and the training goes on. The same is said once a minute."""
    text, now = str(error), time.monotonic()
    level = logging.WARNING if now >= _said.get(text, now) else logging.DEBUG
    if level == logging.WARNING:
        _said.clear()
        _said[text] = now + SELDOM_SECONDS
    LOG.log(level, "no checkpoint: %s; the one before it stays", text, extra={"event": "checkpoint"})


def read(file: Path, run: str | None = None) -> dict[str, Any]:
    """The newest state that is sound: of `file`, or with a word in the log of the one before it. Raises InputError
    where there is none, or it is of another run than `run`."""
    refused: list[InputError] = []
    for candidate in (file, before(file)):
        if not candidate.exists():
            continue
        try:
            state = _read(candidate, run)
        except InputError as error:
            refused.append(error)
            continue
        if refused:
            LOG.warning("%s; going on from the one before it", refused[0])
            file.replace(file.with_name(f"{file.name}.damaged"))
            before(file).replace(file)
        return state
    if refused:
        raise refused[0]
    raise InputError(str(file), "the state of a run", "none", "train anew")


def there(file: Path) -> bool:
    """Whether there is a state to go on from, sound or not."""
    return file.exists() or before(file).exists()


def before(file: Path) -> Path:
    return file.with_name(f"{file.name}.1")


def remove(file: Path) -> None:
    for one in (file, before(file), file.with_name(f"{file.name}.damaged")):
        one.unlink(missing_ok=True)


def _read(file: Path, run: str | None) -> dict[str, Any]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(str(file), "the state of a run", str(error.strerror), _REMEDY) from None
    end = content.find(b"\n", len(_MAGIC), len(_MAGIC) + _MOST_HEADER_BYTES)
    if _MAGIC.startswith(content[: len(_MAGIC)]) and end < 0:
        found = "an empty file" if not content else f"the first {len(content)} bytes of one"
        raise InputError(str(file), "the state of a run", found, _REMEDY)
    if not content.startswith(_MAGIC):
        raise InputError(str(file), "the state of a run", "another file, or one of an older version", "train anew")
    begin = end + 1
    try:
        header = parse_json(content[len(_MAGIC) : end].decode())
        known = header["format"], header["run"], header["bytes"]
    except (ValueError, KeyError, TypeError):
        raise InputError(str(file), "a header as it was written", "another", _REMEDY) from None
    if known[0] != FORMAT:
        raise InputError(str(file), f"format {FORMAT}", f"{known[0]!r}"[:40], "use the halfpass that wrote it")
    whole = content[begin : len(content) - hashlib.blake2b().digest_size]
    if len(whole) != known[2]:
        raise InputError(str(file), f"{known[2]!r} bytes"[:40], f"{len(whole)}", _REMEDY)
    if hashlib.blake2b(content[: begin + len(whole)]).digest() != content[begin + len(whole) :]:
        raise InputError(str(file), "the bytes that were written", "others, by their digest", _REMEDY)
    if run is not None and known[1] != run:
        raise InputError(str(file), f"the state of run {run}", f"one of run {known[1]!r}"[:80], _REMEDY)
    try:
        state = torch.load(io.BytesIO(whole), map_location="cpu", weights_only=True)
    except Exception as error:  # what PyTorch has not written fails in any way that its opcodes allow
        found = f"what PyTorch does not read ({type(error).__name__})"  # whose own words tell to allow all
        raise InputError(str(file), "the state of a run", found, _REMEDY) from None
    if not isinstance(state, dict):
        raise InputError(str(file), "the state of a run", type(state).__name__, _REMEDY)
    return state
