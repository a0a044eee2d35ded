"""Uploads on disk: the batches that came in, up to a limit in bytes, for replay and for retraining without a client.

A folder of segments. An upload is appended to the newest one: a header, then its messages as they came, codec bytes
and all. Training uploads are evicted oldest first, a whole segment at a time, to make room; the uploads of the
newest evaluation stay, and count to the limit. Segments are memory-mapped to be read.

What a crash loses: of a killed process, the upload that was being written. If the operating system stops, whatever was
added since the last `flush`. Nothing is lost without a word: each header has a checksum, and one of its upload; only
the newest segment of a kind may end within an upload; numbers go on from segment to segment; and a store that was
closed in good order has said in `closed.json` which ones it holds.
"""

import fcntl
import itertools
import json
import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from google.protobuf.message import DecodeError

from halfpass.bounded import parse_json, read_text
from halfpass.errors import FULL, HalfpassError, InputError, RunError, room_remedy
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.disk import append, sync
from halfpass.wire.messages import few_parts

FORMAT = 3
SEGMENTS = 16  # so many make the limit: what is evicted at a time is the limit's sixteenth, or one upload
OVERHEAD_BYTES = 256 << 10  # of the limit, for what the file system adds: the folder, the ends of blocks
MINIMUM_BYTES = 16 << 20
MOST_ABOUT_BYTES = 1 << 20  # of store.json
MOST_UPLOADS = 10**12  # since a store was made: so many digits the names of segments have
RESTORE = "restore the store from a copy, or train anew into another folder"

_HEADER = struct.Struct("<?QIIIQI")  # test, number, client, epoch, step, length in bytes, CRC-32 of the upload
_CHECKSUM = struct.Struct("<I")  # CRC-32 of the header, which follows it
_HEAD_BYTES = _HEADER.size + _CHECKSUM.size
_NAME = re.compile(r"(uploads|test)-([0-9]{12})\.segment")


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
        if (named := _NAME.fullmatch(file.name)) is None:
            raise ValueError(f"a file {file.name}")
        self.test, self.first = named[1] == "test", int(named[2])
        self.places: list[_Place] = []
        self.size = 0  # bytes of whole uploads
        self.flushed = True

    @property
    def next(self) -> int:
        """The number of the upload after its last one."""
        return self.first + len(self.places)

    def scan(self, place: str, newest: bool) -> None:
        """Finds the uploads by their headers; what a killed process left of the `newest` segment's last one is not
        among them. Raises InputError where a header is damaged, or another segment ends within an upload."""
        end, place = self.file.stat().st_size, f"{place}, {self.file.name}"
        with self.file.open("rb") as file:
            while (begin := file.tell()) < end:
                head = file.read(_HEAD_BYTES)
                header, checksum = head[: _HEADER.size], head[_HEADER.size :]
                if len(head) == _HEAD_BYTES and checksum != _CHECKSUM.pack(zlib.crc32(header)):
                    raise InputError(place, f"upload {self.next}", f"a damaged header at byte {begin}", RESTORE)
                if len(head) < _HEAD_BYTES or file.tell() + _HEADER.unpack(header)[-2] > end:
                    if newest:
                        return
                    raise InputError(place, f"all of upload {self.next}", f"the file's end, byte {end}", RESTORE)
                test, number, client, epoch, step, length, data_checksum = _HEADER.unpack(header)
                if (test, number) != (self.test, self.next):
                    found = f"{'test' if test else 'training'} upload {number} at byte {begin}"
                    raise InputError(place, f"upload {self.next}", found, RESTORE)
                key = Key(client, epoch, step, number, test)
                self.places.append(_Place(key, file.tell(), length, data_checksum))
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
        self._adds = False  # then `closed.json` is not there
        with self._explained():
            self._about = (folder / "store.json").open("r" if limit_bytes is None else "a+")
            try:
                self._lock()
                self.identity = self._read_about()
                self._segments = {test: self._scanned(test) for test in (False, True)}
                self._check_closed()
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
            store._begin_adding()
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

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        with suppress(RunError) if error else nullcontext():  # the first error is the one to be told
            self.close()

    def close(self) -> None:
        """Of a store to add to: after `flush`, and says in `closed.json` what it holds. Where that fails, the store is
        as a killed process leaves it."""
        try:
            if self._adds:
                self._adds = False
                self.flush()
                with self._explained():
                    partial = self._closed.with_suffix(".part")
                    partial.write_text(json.dumps(self._numbers()))
                    partial.replace(self._closed)
        finally:
            self._about.close()  # and gives up the lock

    def flush(self) -> None:
        """Waits until what was added is on the disk."""
        with self._explained():
            for segment in (s for segments in self._segments.values() for s in segments if not s.flushed):
                sync(segment.file)
                segment.flushed = True
            sync(self.folder)  # which holds the names of new segments

    # -- adding

    def add(self, batches: Sequence[pb.Batch]) -> Key:
        """Keeps an upload, a batch or the micro-batches of one, after evicting training uploads until it fits.

        A test upload of another epoch than those kept replaces them. Raises InputError when the batch and the test
        uploads alone are more than the limit.
        """
        batch, data = batches[0], pb.Upload(batches=batches).SerializeToString()
        checksum = zlib.crc32(data)
        with self._explained():
            if batch.test and any(key.epoch != batch.epoch for key in self.keys(test=True)):
                self._drop(True, len(self._segments[True]))
            self._make_room(_HEAD_BYTES + len(data))
            segment = self._segment_for(batch.test, _HEAD_BYTES + len(data))
            key = Key(batch.client, batch.epoch, batch.step, segment.next, batch.test)
            header = _HEADER.pack(key.test, key.number, key.client, key.epoch, key.step, len(data), checksum)
            record = header + _CHECKSUM.pack(zlib.crc32(header)) + data
            append(segment.file, segment.size, record)
            segment.flushed = False
        segment.places.append(_Place(key, segment.size + _HEAD_BYTES, len(data), checksum))
        segment.size += len(record)
        return key

    def add_test(self, batch: pb.Batch) -> None:
        """Keeps a test's upload as `add` does. Where there is no room for all of a test's, none of them stays."""
        if self._tests_fit and self._lasting(_HEAD_BYTES + pb.Upload(batches=[batch]).ByteSize()) <= self._room:
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
                segments[-1].size = later[0].offset - _HEAD_BYTES
                del segments[-1].places[-len(later) :]
                os.truncate(segments[-1].file, segments[-1].size)
                segments[-1].flushed = False

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
        full = segments and segments[-1].places and segments[-1].size + size > self._limit_bytes // SEGMENTS
        if not segments or full:
            number = segments[-1].next if segments else self._next[test]
            name = f"{'test' if test else 'uploads'}-{number:012}.segment"
            segments.append(_Segment(self.folder / name))
        return segments[-1]

    def _drop(self, test: bool, count: int) -> None:
        """The oldest segments."""
        for segment in self._segments[test][:count]:
            segment.file.unlink()
            self._next[test] = segment.next
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
            if (size := os.fstat(file.fileno()).st_size) < place.offset + place.length:  # beyond it, a map is SIGBUS
                name, expected = f"{self._place}, {segment.file.name}", f"all of upload {key.number}"
                raise InputError(name, expected, f"the file's end, byte {size}", RESTORE)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                data = view[place.offset : place.offset + place.length]
        upload = f"upload of client {key.client}, epoch {key.epoch}, step {key.step}"
        name = f"{self._place}, {segment.file.name}, {upload}"
        if zlib.crc32(data) != place.checksum:
            raise InputError(name, f"checksum {place.checksum:08x}", f"{zlib.crc32(data):08x}", RESTORE)
        try:
            batches = list(pb.Upload.FromString(data).batches) if few_parts(data) else []
        except DecodeError:
            batches = []
        if not batches:
            raise InputError(name, "an Upload message", f"{place.length} bytes that are none", RESTORE)
        return batches

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

    def _scanned(self, test: bool) -> list[_Segment]:
        files = self.folder.glob(f"{'test' if test else 'uploads'}-*.segment")
        segments = sorted(map(_Segment, files), key=lambda segment: segment.first)
        for segment in segments:
            segment.scan(self._place, newest=segment is segments[-1])
        for one, following in itertools.pairwise(segments):
            if one.next != following.first:
                place, found = f"{self._place}, {following.file.name}", f"{following.first} in its name"
                raise InputError(place, f"upload {one.next} to come after {one.file.name}", found, RESTORE)
        return segments

    def _read_about(self) -> dict[str, Any]:
        """The identity; empty in a store that is only being made."""
        self._about.seek(0)
        text = self._about.read(MOST_ABOUT_BYTES + 1)
        if not text and self._limit_bytes is not None and not any(self.folder.glob("*.segment")):
            return {}
        about = parse_json(text, MOST_ABOUT_BYTES)
        if about.get("format") != FORMAT:
            raise InputError(
                self._place, f"format {FORMAT}", str(about.get("format")), "use the halfpass that wrote it"
            )
        if (found := _checksum_of(about["identity"])) != about["checksum"]:
            expected = f"an identity of checksum {about['checksum']}"
            raise InputError(f"{self._place}, store.json", expected, f"{found}", RESTORE)
        return dict(about["identity"])

    @property
    def _closed(self) -> Path:
        return self.folder / "closed.json"

    def _numbers(self) -> dict[str, list[int]]:
        """For each kind, the number of the first upload, and of the one after the last."""
        numbers = {}
        for test, segments in self._segments.items():
            first, following = (segments[0].first, segments[-1].next) if segments else (self._next[test],) * 2
            numbers["test" if test else "uploads"] = [first, following]
        return numbers

    def _check_closed(self) -> None:
        """Raises InputError where the store was closed in good order, and holds other uploads now."""
        if not self._closed.exists():
            return
        said = parse_json(read_text(self._closed, MOST_ABOUT_BYTES))
        for test, kind in ((False, "uploads"), (True, "test")):
            first, following = said[kind]
            if not (type(first) is type(following) is int and 0 <= first <= following < MOST_UPLOADS):
                raise InputError(f"{self._place}, closed.json", "numbers of uploads", f"{said[kind]}", RESTORE)
            if not self._segments[test] and first == following:
                self._next[test] = following
            if (held := self._numbers()[kind]) != [first, following]:
                expected = f"{following - first} {'test' if test else 'training'} uploads from number {first} on"
                found = f"{held[1] - held[0]} from number {held[0]} on"
                raise InputError(self._place, f"{expected}, as closed.json says", found, RESTORE)

    def _begin_adding(self) -> None:
        """What `closed.json` says is no longer so, and what a killed process left of an upload goes."""
        with self._explained():
            self._closed.unlink(missing_ok=True)
            for segments in self._segments.values():
                for segment in segments[-1:]:
                    os.truncate(segment.file, segment.size)
        self._adds = True

    def _settle(self, identity: dict[str, Any]) -> None:
        """Gives a new store its identity; refuses an old one of another identity."""
        with self._explained():
            if not self.identity:
                about = {"format": FORMAT, "identity": identity, "checksum": _checksum_of(identity)}
                self._about.write(json.dumps(about))
                self._about.flush()
                os.fsync(self._about.fileno())
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
            if error.errno in FULL:
                reason = "free space, or lower server.store_limit"
                raise RunError(self._place, "room on the disk", str(error.strerror), reason) from None
            raise RunError(self._place, "a disk that can be read and written", str(error), remedy) from None


def _checksum_of(identity: object) -> int:
    return zlib.crc32(json.dumps(identity, sort_keys=True).encode())


def _make_folder(folder: Path) -> None:
    """Makes it where it is missing; raises InputError where it is another's."""
    remedy = "choose another folder for server.store"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "store.json").exists() and any(folder.iterdir()):
            raise InputError(f"store {folder}", "a store of uploads or an empty folder", "other files", remedy)
    except OSError as error:
        expected, remedy = "a folder that can be written", room_remedy(error, remedy)
        raise InputError(f"store {folder}", expected, str(error.strerror), remedy) from None
