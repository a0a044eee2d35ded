"""Uploads on disk: the batches that came in, up to a limit in bytes, for replay and for retraining without a client.

A folder of segments. An upload is appended to the newest one: a header, then its messages as they came, codec bytes
and all. Training uploads are evicted oldest first, a whole segment at a time, to make room; the uploads of the
newest evaluation stay, and count to the limit. Segments are memory-mapped to be read.

What a crash loses: of a killed process, the upload that was being written. If the operating system stops, whatever was
added since the last `flush`. Every upload has a checksum, so that none is trained on damaged.
"""

import errno
import fcntl
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from google.protobuf.message import DecodeError

from halfpass.bounded import parse_json
from halfpass.errors import HalfpassError, InputError, RunError
from halfpass.wire import halfpass_pb2 as pb

FORMAT = 2
SEGMENTS = 16  # so many make the limit: what is evicted at a time is the limit's sixteenth, or one upload
OVERHEAD_BYTES = 256 << 10  # of the limit, for what the file system adds: the folder, the ends of blocks
MINIMUM_BYTES = 16 << 20
MOST_ABOUT_BYTES = 1 << 20  # of store.json

_HEADER = struct.Struct("<IIIQI")  # client, epoch, step, length in bytes, CRC-32
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Key(NamedTuple):
    """Names an upload; `number` counts the training or the test uploads of the store as they came, from 0."""

    client: int
    epoch: int
    step: int
    number: int
    test: bool = False


class _Place(NamedTuple):
    """Where the bytes of an upload are."""

    key: Key
    offset: int
    length: int
    checksum: int


class _Segment:
    """One file; its name tells whether its uploads are a test's, and the number of its first one."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.test, self.first = file.name.startswith("test-"), int(file.stem.partition("-")[2])
        self.places: list[_Place] = []
        self.size = 0  # bytes of whole uploads

    def scan(self) -> None:
        """Finds the uploads by their headers. What a killed process left of its last one is not among them."""
        end = self.file.stat().st_size
        with self.file.open("rb") as file:
            while len(header := file.read(_HEADER.size)) == _HEADER.size:
                client, epoch, step, length, checksum = _HEADER.unpack(header)
                if file.tell() + length > end:
                    break
                key = Key(client, epoch, step, self.first + len(self.places), self.test)
                self.places.append(_Place(key, file.tell(), length, checksum))
                self.size = file.seek(length, os.SEEK_CUR)


class UploadStore:
    """Made by `open` or `open_existing`; for one thread. One process may have a store open for writing, or several for
    reading. Whatever fails raises InputError (the folder or the limit cannot be used) or RunError (the disk is full).
    """

    identity: dict[str, Any]

    def __init__(self, folder: Path, limit_bytes: int | None) -> None:
        """To read only where there is no limit."""
        self.folder, self._place, self._limit_bytes = folder, f"store {folder}", limit_bytes
        self._next = {False: 0, True: 0}  # number of the next upload, where no segment tells
        self._tests_fit = True
        with self._explained():
            self._about = (folder / "store.json").open("r" if limit_bytes is None else "a+")
            try:
                self._lock()
                self._segments = {test: self._scanned("test" if test else "uploads") for test in (False, True)}
                self.identity = self._read_about()
            except BaseException:
                self.close()
                raise

    @classmethod
    def open(cls, folder: Path, *, identity: Mapping[str, Any], limit_bytes: int) -> Self:
        """Opens a store to add to, or makes one. `folder` then takes at most `limit_bytes` of the disk.

        `identity` is kept as JSON; a store of another one is refused. Of one that is larger the oldest uploads go.
        """
        if limit_bytes < MINIMUM_BYTES:
            raise InputError("server.store_limit", f"at least {MINIMUM_BYTES} bytes", str(limit_bytes), "raise it")
        _make_folder(folder)
        store = cls(folder, limit_bytes)
        try:
            store._settle(json.loads(json.dumps(identity)))
            store._make_room(0)
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def open_existing(cls, folder: Path) -> Self:
        """Opens a store to read. Raises InputError where there is none."""
        if not (folder / "store.json").is_file():
            raise InputError(f"store {folder}", "a store of uploads", "none", "give its folder as server.store")
        return cls(folder, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Without `flush`: what was added is then with the operating system, and not surely on the disk."""
        self._about.close()  # and gives up the lock

    def flush(self) -> None:
        """Waits until what was added is on the disk."""
        with self._explained():
            for segments in self._segments.values():
                for segment in segments[-1:]:
                    with segment.file.open("rb") as file:
                        os.fsync(file.fileno())

    # -- adding

    def add(self, batches: Sequence[pb.Batch]) -> Key:
        """Keeps an upload, a batch or the micro-batches of one, after evicting training uploads until it fits.

        A test upload of another epoch than those kept replaces them. Raises InputError when the batch and the test
        uploads alone are more than the limit.
        """
        batch, data = batches[0], pb.Upload(batches=batches).SerializeToString()
        checksum = zlib.crc32(data)
        record = _HEADER.pack(batch.client, batch.epoch, batch.step, len(data), checksum) + data
        with self._explained():
            if batch.test and any(key.epoch != batch.epoch for key in self.keys(test=True)):
                self._drop(True, len(self._segments[True]))
            self._make_room(len(record))
            segment = self._segment_for(batch.test, len(record))
            _append(segment.file, record, segment.size)
        key = Key(batch.client, batch.epoch, batch.step, segment.first + len(segment.places), batch.test)
        offset = segment.size + _HEADER.size
        segment.places.append(_Place(key, offset, len(data), checksum))
        segment.size += len(record)
        return key

    def add_test(self, batch: pb.Batch) -> None:
        """Keeps a test's upload as `add` does. Where there is no room for all of a test's, none of them stays."""
        if self._tests_fit and self._lasting(_HEADER.size + pb.Upload(batches=[batch]).ByteSize()) <= self._room:
            self.add([batch])
        else:
            self._tests_fit = False
            with self._explained():
                self._drop(True, len(self._segments[True]))

    def forget(self, number: int) -> None:
        """Drops the training uploads from that number on, and all test uploads: those of a training that is gone on
        with from before they came."""
        with self._explained():
            self._drop(True, len(self._segments[True]))
            segments = self._segments[False]
            while segments and segments[-1].first >= number:  # the newest first, so that no gap is left at any time
                segments.pop().file.unlink()
            if not segments:
                self._next[False] = number
            elif later := segments[-1].places[number - segments[-1].first :]:
                segments[-1].size = later[0].offset - _HEADER.size
                del segments[-1].places[-len(later) :]
                os.truncate(segments[-1].file, segments[-1].size)

    def _make_room(self, size: int) -> None:
        if (lasting := self._lasting(size)) > self._room:
            raise InputError(
                "server.store_limit", f"at least {lasting + OVERHEAD_BYTES} bytes for a batch and the test uploads",
                str(self._limit_bytes), "raise it, or send smaller batches",
            )  # fmt: skip
        while size + self.used_bytes > self._room:
            self._drop(False, 1)

    @property
    def _room(self) -> int:
        assert self._limit_bytes is not None
        return self._limit_bytes - OVERHEAD_BYTES

    def _lasting(self, size: int) -> int:
        """Bytes that no eviction frees, `size` new ones with them."""
        return size + sum(segment.size for segment in self._segments[True])

    def _segment_for(self, test: bool, size: int) -> _Segment:
        """The newest segment, or a new one where that is full."""
        segments = self._segments[test]
        assert self._limit_bytes is not None
        if not segments or segments[-1].size + size > self._limit_bytes // SEGMENTS:
            number = segments[-1].first + len(segments[-1].places) if segments else self._next[test]
            name = f"{'test' if test else 'uploads'}-{number:012}.segment"
            segments.append(_Segment(self.folder / name))
        return segments[-1]

    def _drop(self, test: bool, count: int) -> None:
        """The oldest segments."""
        for segment in self._segments[test][:count]:
            segment.file.unlink()
            self._next[test] = segment.first + len(segment.places)
        del self._segments[test][:count]

    # -- reading

    def keys(self, *, test: bool = False) -> list[Key]:
        """All uploads, oldest first: training or test. Reads none."""
        return [place.key for segment in self._segments[test] for place in segment.places]

    def read(self, key: Key) -> list[pb.Batch]:
        """The upload as it came, or nothing when it has been evicted. Raises InputError when it is damaged."""
        segments = (s for s in self._segments[key.test] if 0 <= key.number - s.first < len(s.places))
        segment = next(segments, None)
        if segment is None:
            return []
        place = segment.places[key.number - segment.first]
        with self._explained(), segment.file.open("rb") as file:
            if os.fstat(file.fileno()).st_size < place.offset + place.length:  # beyond the end, a map is SIGBUS
                raise ValueError(f"{segment.file.name} has been cut short")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                data = view[place.offset : place.offset + place.length]
        name = f"{self._place}, upload of client {key.client}, epoch {key.epoch}, step {key.step}"
        remedy = "train anew into another folder"
        if zlib.crc32(data) != place.checksum:
            raise InputError(name, f"checksum {place.checksum:08x}", f"{zlib.crc32(data):08x}", remedy)
        try:
            return list(pb.Upload.FromString(data).batches)
        except DecodeError:
            raise InputError(name, "an Upload message", f"{place.length} bytes that are none", remedy) from None

    @property
    def held(self) -> int:
        """Training uploads that are in the store."""
        return sum(len(segment.places) for segment in self._segments[False])

    @property
    def evicted(self) -> int:
        """Training uploads that had to go since the store was made."""
        segments = self._segments[False]
        return segments[0].first if segments else self._next[False]

    @property
    def added(self) -> int:
        """Training uploads since the store was made: the next one's number."""
        return self.evicted + self.held

    @property
    def used_bytes(self) -> int:
        """In training and test uploads."""
        return sum(segment.size for segments in self._segments.values() for segment in segments)

    # -- opening

    def _lock(self) -> None:
        """Several readers or one writer, until the process ends, however it does."""
        kind = fcntl.LOCK_SH if self._limit_bytes is None else fcntl.LOCK_EX
        try:
            fcntl.flock(self._about, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                self._place, "a store that no one writes to", "one that is open elsewhere", "wait until it is closed"
            ) from None

    def _scanned(self, kind: str) -> list[_Segment]:
        segments = [_Segment(file) for file in sorted(self.folder.glob(f"{kind}-*.segment"))]
        for segment in segments:
            segment.scan()
        return segments

    def _read_about(self) -> dict[str, Any]:
        """The identity; empty in a store that is only being made."""
        self._about.seek(0)
        text = self._about.read(MOST_ABOUT_BYTES + 1)
        if not text and self._limit_bytes is not None and not any(self._segments.values()):
            return {}
        about = parse_json(text, MOST_ABOUT_BYTES)
        if about.get("format") != FORMAT:
            raise InputError(
                self._place, f"format {FORMAT}", str(about.get("format")), "use the halfpass that wrote it"
            )
        return dict(about["identity"])

    def _settle(self, identity: dict[str, Any]) -> None:
        """Gives a new store its identity; refuses an old one of another identity."""
        with self._explained():
            if not self.identity:
                self._about.write(json.dumps({"format": FORMAT, "identity": identity}))
                self._about.flush()
                self.identity = identity
        for key in {**identity, **self.identity}:
            run, store = identity.get(key), self.identity.get(key)
            if run != store:
                raise InputError(
                    self._place, f"{key} {run!r} (the run's)", f"{key} {store!r} (the store's)",
                    "choose another folder for server.store, or the same model and cut",
                )  # fmt: skip

    @contextmanager
    def _explained(self) -> Iterator[None]:
        remedy = "choose another folder for server.store"
        try:
            yield
        except HalfpassError:  # an InputError is a ValueError
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(self._place, "an undamaged store of uploads", str(error), remedy) from None
        except OSError as error:
            if error.errno in _FULL:
                reason = "free space, or lower server.store_limit"
                raise RunError(self._place, "room on the disk", str(error.strerror), reason) from None
            raise RunError(self._place, "a disk that can be read and written", str(error), remedy) from None


def _append(file: Path, record: bytes, size: int) -> None:
    """Writes a record at `size`, over what a killed process may have left there; on failure nothing of it stays."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        view, written = memoryview(record), 0
        os.truncate(descriptor, size)
        try:
            while written < len(view):
                written += os.pwrite(descriptor, view[written:], size + written)
        except OSError:
            os.truncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    """Makes it where it is missing; raises InputError where it is another's."""
    remedy = "choose another folder for server.store"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "store.json").exists() and any(folder.iterdir()):
            raise InputError(f"store {folder}", "a store of uploads or an empty folder", "other files", remedy)
    except OSError as error:
        raise InputError(f"store {folder}", "a folder that can be written", str(error.strerror), remedy) from None
