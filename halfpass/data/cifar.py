"""CIFAR-10 and CIFAR-100: the official "python version", read from folder or archive, or fetched first.

What a file says is never run: pickles may name only what an array of numbers needs, and even that is replaced by inert
stand-ins; size, depth and number of parts are bounded before anything is built; archives are read in memory, never
unpacked. Check: `pytest tests/test_data.py`.
"""

import gzip
import hashlib
import http.client
import io
import os
import pickletools  # which names the opcodes of a pickle and builds nothing
import re
import secrets
import tarfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from halfpass.data.samples import Dataset, Samples
from halfpass.data.source import Source
from halfpass.errors import InputError, reason

Arrays = tuple[Tensor, Tensor]  # inputs (N, 3, 32, 32) uint8 in channels-last memory, labels (N,) int64


@dataclass(frozen=True)
class CifarLayout:
    """How one of the two official "python version" data sets is laid out."""

    folder: str
    archive: str
    archive_md5: str
    label_key: str
    classes: int
    train: dict[str, int]  # file → samples in it
    test: dict[str, int]
    mean: tuple[float, float, float]  # of the training pictures / 255
    std: tuple[float, float, float]


CIFAR: dict[str, CifarLayout] = {
    "cifar10": CifarLayout(
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        archive_md5="c58f30108f718f92721af3b95e74349a",
        label_key="labels",
        classes=10,
        train={f"data_batch_{i}": 10_000 for i in range(1, 6)},
        test={"test_batch": 10_000},
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": CifarLayout(
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
        label_key="fine_labels",
        classes=100,
        train={"train": 50_000},
        test={"test": 10_000},
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
}
CIFAR_URL = "https://www.cs.toronto.edu/~kriz"  # HALFPASS_CIFAR_URL in the environment names a mirror
TIMEOUT_SECONDS = 30.0  # for one answer of the server, not for the whole archive
MAX_FILE_BYTES = 2**28  # of one file or archive; the largest official one has 161 MiB
MOST_ARCHIVE_BYTES, MOST_MEMBERS = 2**29, 1000  # of what an archive holds, decompressed; the official ones have 178 MiB


def read_cifar(source: Source) -> Dataset:
    layout = CIFAR[source.name]
    train, test = (Samples(*split) for split in read_layout(layout, source.path, source.download))
    return Dataset(source.name, train, test, layout.classes, layout.mean, layout.std, source.crop_padding)


def read_layout(layout: CifarLayout, path: str | None, download: bool) -> tuple[Arrays, Arrays]:
    """Training and test samples out of the official folder or archive, or a folder that holds either.

    `download` first fetches the archive into the folder `path`, unless a folder or a good archive is there already.
    Raises InputError that names the file which is missing, truncated, corrupted, or says something it should not.
    """
    source = _cifar_source(layout, path, download)
    counts = {**layout.train, **layout.test}
    parts = {
        name: _cifar_batch(place, raw, layout, counts[name]) for name, place, raw in _cifar_files(source, list(counts))
    }
    return _join([parts[name] for name in layout.train]), _join([parts[name] for name in layout.test])


def _cifar_source(layout: CifarLayout, path: str | None, download: bool) -> Path:
    wanted = f"{layout.folder} or {layout.archive}"
    if path is None:
        raise InputError("data.path", f"the place of {wanted}", "none", "give the folder that holds it")
    root = Path(path).expanduser()
    source = _find_cifar(layout, root)
    if download and (source is None or (source.is_file() and not _has_sum(source, layout.archive_md5))):
        return _fetch(layout, root if source is None else source.parent)
    if source is None:
        found = "neither" if root.is_dir() else "no such file or folder"
        raise InputError(str(root), wanted, found, "give the folder that holds it, or let it be downloaded")
    return source


def _find_cifar(layout: CifarLayout, root: Path) -> Path | None:
    if root.is_file():
        return root
    for folder in (root, root / layout.folder):
        if any((folder / name).exists() for name in (*layout.train, *layout.test)):
            return folder  # one file is enough, so that a message can name those that are missing
    archive = root / layout.archive
    return archive if archive.is_file() else None


def _cifar_files(source: Path, names: list[str]) -> Iterator[tuple[str, str, bytes]]:
    """(name, place for messages, content) of every file in `names`, in any order; InputError where one is missing."""
    files = _archive_files(source, names) if source.is_file() else _folder_files(source, names)
    missing = set(names)
    for name, place, raw in files:
        missing.discard(name)
        yield name, place, raw
    if missing:
        first = min(missing, key=names.index)
        raise InputError(str(source), f"{first} in it", "no such file", "get the official archive again")


def _folder_files(folder: Path, names: list[str]) -> Iterator[tuple[str, str, bytes]]:
    for file in (folder / name for name in names):
        if file.is_file():
            _refuse_large(str(file), file.stat().st_size)
            try:
                raw = file.read_bytes()
            except OSError as error:
                _refuse(str(file), "a file that can be read", reason(error), error, "check its permissions")
            yield file.name, str(file), raw


def _archive_files(archive: Path, names: list[str]) -> Iterator[tuple[str, str, bytes]]:
    try:
        with gzip.open(archive) as content, tarfile.open(fileobj=_Limited(archive, content), mode="r|") as members:
            for count, member in enumerate(members):  # in the order of the archive, which is decompressed once
                if count == MOST_MEMBERS:
                    _refuse(str(archive), f"at most {MOST_MEMBERS} files", "more")
                name = member.name.rpartition("/")[2]
                if name in names and member.isfile():
                    _refuse_large(f"{archive}, {member.name}", member.size)
                    yield name, f"{archive}, {member.name}", members.extractfile(member).read()  # type: ignore[union-attr]
                members.members = []  # type: ignore[attr-defined]  # it would keep them all
    except InputError:
        raise
    except Exception as error:  # a corrupted archive fails in any way its headers allow
        _refuse(str(archive), "a whole .tar.gz archive", f"a truncated or corrupted one ({reason(error)})", error)


class _Limited(io.RawIOBase):
    """Reads on in a decompressed archive, as far as one of this data set can go."""

    def __init__(self, archive: Path, content: Any) -> None:
        self._archive, self._content, self._bytes = archive, content, 0

    def read(self, size: int = -1) -> bytes:
        read: bytes = self._content.read(size if size >= 0 else MOST_ARCHIVE_BYTES)
        self._bytes += len(read)
        if self._bytes > MOST_ARCHIVE_BYTES:
            _refuse(str(self._archive), f"at most {MOST_ARCHIVE_BYTES} bytes in it", "more")
        return read


def _refuse_large(place: str, size_bytes: int) -> None:
    if size_bytes > MAX_FILE_BYTES:
        _refuse(place, f"at most {MAX_FILE_BYTES} bytes", f"{size_bytes}")


def _cifar_batch(place: str, raw: bytes, layout: CifarLayout, count: int) -> Arrays:
    content = _unpickle(place, raw)
    if not isinstance(content, dict):
        _refuse(place, "a pickled dict", type(content).__name__)
    named = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    for key in ("data", layout.label_key):
        if key not in named:
            _refuse(place, f"an entry {key!r}", f"only {', '.join(map(repr, list(named)[:8])) or 'nothing'}")
    return _cifar_images(place, named["data"], count), _cifar_labels(place, named[layout.label_key], layout, count)


def _cifar_images(place: str, value: object, count: int) -> Tensor:
    try:
        pixels = _uint8_array(value)
    except (ValueError, TypeError) as error:
        _refuse(f"{place}, 'data'", "an array of uint8", str(error), error)
    if pixels.shape != (count, 3072):
        _refuse(f"{place}, 'data'", f"shape {(count, 3072)}", f"{pixels.shape}")
    pictures = pixels.reshape(count, 3, 32, 32).transpose(0, 2, 3, 1).copy()  # (N, H, W, C): channels last in memory
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)  # (N, C, H, W)


def _cifar_labels(place: str, value: object, layout: CifarLayout, count: int) -> Tensor:
    place = f"{place}, {layout.label_key!r}"
    if not isinstance(value, list) or len(value) != count:
        found = f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__
        _refuse(place, f"a list of {count} labels", found)
    for i, label in enumerate(numbers := [_number(label) for label in value]):
        if label is None or not 0 <= label < layout.classes:
            found = type(value[i]).__name__ if label is None else f"{label}"
            _refuse(f"{place}, label {i}", f"a whole number in 0..{layout.classes - 1}", found)
    return torch.tensor(numbers, dtype=torch.int64)


def _join(parts: list[Arrays]) -> Arrays:
    return torch.cat([inputs for inputs, _ in parts]), torch.cat([labels for _, labels in parts])


# --- Pickles from which only numbers come -----------------------------------------------------------------------------

_ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
    (module, name)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since numpy 2
    for name in ("_reconstruct", "scalar")
}
_INTEGERS = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")
MOST_OPCODES = 2**21  # of one pickle; the official ones have up to 200,000
DEEPEST = 16  # containers in containers
_NAMES = re.compile(r"(\S+) (\S+)")


class _Named:
    """Stands in place of an allowed global: keeps what the pickle hands to it, and does nothing with it.

    The real ones are not safe to call on a stranger's word: numpy's dtype takes its flags from the pickle, and an
    array of objects that is declared plain has its bytes read as pointers.
    """

    def __init__(self, name: str, arguments: tuple[object, ...] = ()) -> None:
        self.name, self.arguments = name, arguments
        self.state: object = None


class _Forbidden(Exception):
    """A pickle named a global that is not among `_ALLOWED`."""


class _Bound(Exception):
    """A pickle is larger, or nested deeper, than one of arrays is."""


def _unpickle(place: str, raw: bytes) -> object:
    try:
        return _Reader().read(raw)
    except _Forbidden as error:
        raise InputError(
            place, "a pickle of arrays, lists, strings and numbers", f"one that names {error}",
            "do not trust this file; get the official archive",
        ) from None
    except _Bound as error:
        _refuse(place, "a pickle of arrays, lists, strings and numbers", str(error), error)
    except Exception as error:  # a corrupted pickle fails in any way the opcodes allow
        _refuse(place, "a whole pickle", f"a truncated or corrupted one ({reason(error)})", error)


class _Reader:
    """The opcodes of which pickled arrays, lists, strings and numbers are made, and no others. Python's own reader
    would build whatever is written: containers nested without end, and a memo as long as a number says."""

    def __init__(self) -> None:
        self.stack: list[tuple[Any, int]] = []  # (value, how deep it is)
        self.marks: list[int] = []
        self.memo: dict[int, tuple[Any, int]] = {}

    def read(self, raw: bytes) -> object:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
            if count == MOST_OPCODES:
                raise _Bound(f"one of more than {MOST_OPCODES} parts")
            if opcode.name == "STOP":
                return self._pop()
            self._step(opcode.name, argument)
        raise EOFError("no end")

    def _step(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self._push(_VALUES[name], 0)
        elif name in _ARGUMENTS:
            if isinstance(argument, int) and abs(argument) > 2**64:
                raise _Bound("one with a number of more than 64 bits")
            self._push(argument, 0)
        elif name in _EMPTY:
            self._push(_EMPTY[name](), 1)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            value, deep = self.memo[argument]
            if isinstance(value, (list, dict)):  # it might come to hold itself
                raise _Bound("one that names a container twice")
            self._push(value, deep)
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name not in ("PROTO", "FRAME"):
            self._build(name, argument)

    def _build(self, name: str, argument: Any) -> None:
        if name == "GLOBAL":
            self._name(*_NAMES.fullmatch(argument).groups())  # type: ignore[union-attr]
        elif name == "STACK_GLOBAL":
            last, module = self._pop(), self._pop()
            self._name(module, last)
        elif name == "REDUCE":
            arguments, deep = self.stack.pop()
            called = self._pop()
            self._push(_Named(_as(_Named, called).name, _as(tuple, arguments)), deep)
        elif name == "BUILD":
            state, deep = self.stack.pop()
            named = self._pop()
            _as(_Named, named).state = state
            self._push(named, deep)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self._tuple(int(name[-1]))
        elif name == "TUPLE":
            self._tuple(len(self.stack) - self.marks.pop())
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "LIST", "DICT"):
            self._fill(name)
        else:
            raise _Forbidden(f"the opcode {name}")

    def _fill(self, name: str) -> None:
        """What is on top goes into the list or dict below it."""
        count = {"APPEND": 1, "SETITEM": 2}.get(name)
        parts = self._take(len(self.stack) - self.marks.pop() if count is None else count)
        if name in ("LIST", "DICT"):
            self._push([] if name == "LIST" else {}, 1)
        whole, deep = self.stack.pop()
        if name in ("APPEND", "APPENDS", "LIST"):
            _as(list, whole).extend(part for part, _ in parts)
        else:
            keys = [_as((str, bytes), part) for part, _ in parts[::2]]
            _as(dict, whole).update(zip(keys, (part for part, _ in parts[1::2]), strict=True))
        self._push(whole, max([deep, *(1 + part_deep for _, part_deep in parts)]))

    def _tuple(self, count: int) -> None:
        parts = self._take(count)
        self._push(tuple(part for part, _ in parts), max([1, *(1 + deep for _, deep in parts)]))

    def _take(self, count: int) -> list[tuple[Any, int]]:
        if not 0 <= count <= len(self.stack):
            raise IndexError("too few parts")
        parts = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return parts

    def _name(self, module: object, name: object) -> None:
        if (module, name) not in _ALLOWED:
            raise _Forbidden(f"{module}.{name}")
        self._push(_Named(str(name)), 0)

    def _push(self, value: object, deep: int) -> None:
        if deep > DEEPEST:
            raise _Bound(f"one nested deeper than {DEEPEST}")
        self.stack.append((value, deep))

    def _pop(self) -> Any:
        return self.stack.pop()[0]


def _as(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a part of another kind, {type(value).__name__}")
    return value


_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], object]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_ARGUMENTS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8",
}  # fmt: skip


def _uint8_array(value: object) -> np.ndarray:
    """The array of uint8 that stand-ins describe, read-only; ValueError or TypeError says what is there instead."""
    match value:
        case _Named(
            name="_reconstruct",
            state=(_, tuple(shape), _Named(name="dtype", arguments=(str() | bytes() as code, *_)), fortran, data),
        ):
            if _text(code) != "u1":
                raise ValueError(f"an array of type {_text(code)!r}")
            return np.frombuffer(_raw(data), np.uint8).reshape(shape, order="F" if fortran else "C")
    raise ValueError("no array" if isinstance(value, _Named) else type(value).__name__)


def _number(value: object) -> int | None:
    match value:
        case int():
            return value
        case _Named(name="scalar", arguments=(_Named(name="dtype", arguments=(str() | bytes() as code, *_)), data)):
            kind = _text(code)
            if kind in _INTEGERS and isinstance(data, (bytes, str, _Named)) and len(number := _raw(data)) <= 8:
                return int.from_bytes(number, "little", signed=kind[0] == "i")
    return None


def _raw(value: object) -> bytes:
    match value:
        case bytes():
            return value
        case str():  # of Python 2, whose strings are bytes
            return value.encode("latin1")
        case _Named(name="encode", arguments=(str() as text, "latin1" | b"latin1")):  # protocol 2 of Python 3
            return text.encode("latin1")
    raise ValueError("an array without its bytes")


def _text(code: str | bytes) -> str:
    return code.decode("latin1") if isinstance(code, bytes) else code


# --- The official archive, fetched ------------------------------------------------------------------------------------


def _fetch(layout: CifarLayout, folder: Path) -> Path:
    """The archive, downloaded into `folder` (made where it is missing); only one with the right sum gets its name."""
    url = f"{os.environ.get('HALFPASS_CIFAR_URL', CIFAR_URL).rstrip('/')}/{layout.archive}"
    part = folder / f"{layout.archive}.{secrets.token_hex(4)}.part"  # a second download may run beside this one
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _copy_url(url, part)
        if not _has_sum(part, layout.archive_md5):
            _refuse(url, f"an archive with md5 {layout.archive_md5}", f"md5 {_md5(part)}", remedy="try it again")
        return part.replace(folder / layout.archive)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, InputError):
            raise
        remedy = "check the address and the folder"
        _refuse(url, f"an archive to keep in {folder}", reason(error), error, remedy)
    finally:
        part.unlink(missing_ok=True)


def _copy_url(url: str, file: Path) -> None:
    size_bytes = 0
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, file.open("xb") as copy:
        while chunk := answer.read(2**20):
            size_bytes += len(chunk)
            _refuse_large(url, size_bytes)
            copy.write(chunk)


def _md5(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _has_sum(file: Path, md5: str) -> bool:
    return _md5(file) == md5


def _refuse(
    place: str,
    expected: str,
    found: str,
    cause: Exception | None = None,
    remedy: str = "get the official archive again",
) -> NoReturn:
    raise InputError(place, expected, found, remedy) from cause
