"""What one side has said and the other may need again: a sequence of messages, kept until the other has them durably.

Messages are numbered from 1, their places. The newest are in memory; what is more than that has room for, and all of it
at a checkpoint, is in a spool on disk: segments of records, each with a checksum. A segment whose messages the other
side has in a checkpoint is written over by a later one: a file that grows costs several times as much, for each page of
it is to be found first.

What a crash loses: nothing that was there at the checkpoint (`save`), also where the machine stops. Where something is
missing or damaged nevertheless, `load` says so.
"""

import os
import struct
import threading
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from halfpass.errors import InputError, RunError, room_remedy
from halfpass.wire.disk import sync, write_at

FORMAT = b"halfpass spool 1\n"
SEGMENT_BYTES = 32 << 20  # what goes at a time
MOST_SPARE = 32  # segments that wait to be written over
_RECORD = struct.Struct("<QQI")  # place, bytes, CRC-32 of both and of the message
_REMEDY = "begin the run anew, in another folder"


@dataclass
class _Kept:
    """A message, in memory, or at `offset` of a segment."""

    place: int
    size: int
    data: bytes | None
    before: int = 0  # bytes of all messages before it
    segment: "_Segment | None" = None
    offset: int = 0


@dataclass
class _Segment:
    file: Path
    size: int
    last: int = 0  # place
    unsynced: bool = True  # since it was written to


class Outbox:
    """For several threads. Without a folder all is kept in memory, and `load` and `save` are not for it."""

    def __init__(
        self, folder: Path | None = None, *, run: str = "", memory_bytes: int = 2**23, disk_bytes: int = 2**32
    ) -> None:
        """`run` names what the spool belongs to; it may be set later, before anything is written."""
        self.folder, self.run = folder, run
        self.last = 0  # place of the newest message
        self.durable = 0  # up to here the other side needs none again
        self.kept_bytes = 0  # behind that
        self._memory_bytes, self._disk_bytes = memory_bytes, disk_bytes
        self._kept: deque[_Kept] = deque()
        self._in_memory: deque[_Kept] = deque()
        self._held_bytes = 0  # in memory
        self._added_bytes = 0  # in all
        self._segments: deque[_Segment] = deque()
        self._parted: list[Path] = []  # segments that nobody needs; the disk may know them by their old names
        self._spare: list[Path] = []  # and those that may be written over
        self._lock = threading.RLock()

    @property
    def first(self) -> int:
        """The earliest place that can be sent again."""
        return self.durable + 1

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more may be kept; always where nothing is."""
        return not self._kept or self.kept_bytes + size <= self._disk_bytes

    def add(self, data: bytes) -> int:
        """Keeps a message; returns its place, which is the one behind the newest."""
        with self._lock:
            self.last += 1
            kept = _Kept(self.last, len(data), data, self._added_bytes)
            if self.last <= self.durable:  # made again, and needed by nobody
                return self.last
            self._kept.append(kept)
            self._in_memory.append(kept)
            self.kept_bytes += kept.size
            self._added_bytes += kept.size
            self._held_bytes += kept.size
            if self.folder is not None and self._held_bytes > self._memory_bytes:
                with suppress(RunError):  # no room on the disk: then it stays in memory
                    self._spill(self._memory_bytes // 2)
            return self.last

    def get(self, place: int) -> bytes:
        """The message at a place that is kept. Raises InputError where it is damaged."""
        with self._lock:
            kept = self._kept[place - self._kept[0].place]
            if kept.data is not None:
                return kept.data
            assert kept.segment is not None
            return _read(kept.segment.file, kept.place, kept.offset)

    def bytes_behind(self, place: int) -> int:
        """Of the messages behind that place, as far as they are kept."""
        with self._lock:
            if not self._kept or place >= self.last:
                return 0
            return self._added_bytes - self._kept[max(0, place + 1 - self._kept[0].place)].before

    def let_go(self, place: int) -> None:
        """The other side has what is up to there durably."""
        with self._lock:
            self.durable = max(self.durable, place)
            while self._kept and self._kept[0].place <= place:
                gone = self._kept.popleft()
                self.kept_bytes -= gone.size
                if self._in_memory and self._in_memory[0] is gone:
                    self._in_memory.popleft()
                    self._held_bytes -= gone.size
            while self._segments and self._segments[0].last <= self.durable:
                self._part_with(self._segments.popleft().file)

    def _part_with(self, file: Path) -> None:
        """Of a segment that nobody needs: a later one may be written over it, once the disk knows it by another
        name."""
        with suppress(FileNotFoundError):
            if len(self._parted) + len(self._spare) >= MOST_SPARE:
                file.unlink()
            else:
                self._parted.append(file.replace(file.with_suffix(".spare")))

    def save(self) -> None:
        """All that is kept is in the spool then, and on the disk with `sync`. Raises RunError where there is no
        room."""
        with self._lock:
            self._spill(0)

    def sync(self) -> None:
        """Waits until what was saved is on the disk; others may go on meanwhile. Raises RunError where it cannot be
        written."""
        with self._lock:
            unsynced = [segment for segment in self._segments if segment.unsynced]
            for segment in unsynced:
                segment.unsynced = False  # what is written meanwhile is for the next time
            parted, self._parted = self._parted, []
        try:
            for segment in unsynced:
                with suppress(FileNotFoundError):  # it was let go meanwhile
                    sync(segment.file)
            if (unsynced or parted) and self.folder is not None:
                sync(self.folder)  # which holds the names of new segments
        except OSError as error:
            with self._lock:
                self._parted += parted
                for segment in unsynced:
                    segment.unsynced = True
            place, expected = f"spool {self.folder}", "a disk that can be written"
            raise RunError(place, expected, str(error.strerror), "look at it") from error
        with self._lock:
            self._spare += parted

    def load(self, last: int, durable: int) -> None:
        """Takes up what an earlier process has saved at a checkpoint, when `last` was its newest message and the other
        side had those up to `durable`, and perhaps more since; what is behind it is made again. Raises InputError where
        some are missing or damaged, or of another run, or the folder cannot be written."""
        assert self.folder is not None
        try:
            self._load(last, durable)
        except OSError as error:
            expected, remedy = "a folder that can be read and written", "mend that, and go on again"
            raise InputError(f"spool {self.folder}", expected, str(error.strerror), remedy) from error

    def _load(self, last: int, durable: int) -> None:
        assert self.folder is not None
        with self._lock:
            self.last, self.durable = last, durable
            self._unlink_spare()
            files = sorted(file for file in self.folder.glob("*.spool") if file.stem.isdecimal())
            segments = [self._scanned(file) for file in files]
            there = {kept.place: kept for kept in self._kept}  # of one that was made twice, the later
            # What was before the first segment went because the other side had it.
            first = max(durable + 1, min((int(segment.file.stem) for segment in segments), default=last + 1))
            if missing := [place for place in range(first, last + 1) if place not in there]:
                expected = f"messages {first} to {last}, which the run may need again"
                found = f"none with number {missing[0]}, or a damaged one"
                raise InputError(f"spool {self.folder}", expected, found, _REMEDY)
            self.durable = max(durable, min(first, last + 1) - 1)
            self._kept = deque(there[place] for place in range(first, last + 1))
            for kept in self._kept:
                kept.before = self._added_bytes
                self._added_bytes += kept.size
            self.kept_bytes = self._added_bytes
            for segment in segments:
                if segment.last > durable:
                    os.truncate(segment.file, segment.size)
                    self._segments.append(segment)
                else:
                    segment.file.unlink()

    def restart(self, last: int) -> None:
        """Nothing that was kept is needed, and the next message's place is behind `last`."""
        with self._lock:
            self.let_go(self.last)
            self.last = self.durable = last
            self._unlink_spare()  # their records' numbers may come again

    def clear(self) -> None:
        """Nothing is needed any more."""
        with self._lock:
            self.let_go(self.last)
            if self.folder is not None:
                for file in self.folder.glob("*.spool"):
                    file.unlink(missing_ok=True)
                self._unlink_spare()
                with suppress(OSError):
                    self.folder.rmdir()

    def _unlink_spare(self) -> None:
        self._parted, self._spare = [], []
        if self.folder is not None:
            for file in self.folder.glob("*.spare"):
                file.unlink(missing_ok=True)

    def _spill(self, leave_bytes: int) -> None:
        """The oldest of what is in memory alone goes to disk, until no more than that is left."""
        while self._in_memory and self._held_bytes > leave_bytes:
            kept = self._in_memory[0]
            assert kept.data is not None
            segment = self._segment()
            record = _RECORD.pack(kept.place, kept.size, _checksum(kept.place, kept.size, kept.data))
            try:
                write_at(segment.file, segment.size, record, kept.data)
            except OSError as error:
                raise self._no_room(error) from error
            kept.offset = segment.size + len(record)
            segment.size, segment.last, segment.unsynced = kept.offset + kept.size, kept.place, True
            kept.segment, kept.data = segment, None
            self._in_memory.popleft()
            self._held_bytes -= kept.size

    def _segment(self) -> _Segment:
        if not self._segments or self._segments[-1].size >= SEGMENT_BYTES:
            assert self.folder is not None
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = self.folder / f"{self._in_memory[0].place:012}.spool"
                head = FORMAT + self.run.encode() + b"\n"
                write_at(self._spare.pop().replace(file) if self._spare else file, 0, head)
            except OSError as error:
                raise self._no_room(error) from error
            self._segments.append(_Segment(file, len(head)))
        return self._segments[-1]

    def _no_room(self, error: OSError) -> RunError:
        expected, remedy = "room for what the other side may need again", room_remedy(error, "look at it")
        return RunError(f"spool {self.folder}", expected, str(error.strerror), remedy)

    def _scanned(self, file: Path) -> _Segment:
        """A segment, up to what is behind `last` or is not whole; its messages are among those kept then."""
        head = FORMAT + self.run.encode() + b"\n"
        segment = _Segment(file, len(head))
        with file.open("rb") as opened:
            found = opened.read(len(head))
            if len(found) < len(head) and head.startswith(found):  # empty, or cut short: `load` says what is missing
                return segment
            if found != head:
                what = "one of another run" if found.startswith(FORMAT) else "none, or of another version"
                raise InputError(f"spool {file}", f"one of run {self.run}", what, _REMEDY)
            for expected, (number, offset, data) in enumerate(_records(opened), int(file.stem)):
                if number > self.last or number != expected:  # of a segment that this one was written over
                    break
                if number > self.durable:
                    self._kept.append(_Kept(number, len(data), None, segment=segment, offset=offset))
                segment.size, segment.last = offset + len(data), number
        return segment


def _checksum(place: int, size: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(struct.pack("<QQ", place, size)))


def _records(opened: IO[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """(place, where the message begins, the message) of each record from here, up to the first that is not whole."""
    end = os.fstat(opened.fileno()).st_size
    while len(head := opened.read(_RECORD.size)) == _RECORD.size:
        place, size, checksum = _RECORD.unpack(head)
        offset = opened.tell()
        if size > end - offset or _checksum(place, size, data := opened.read(size)) != checksum:
            return
        yield place, offset, data


def _read(file: Path, place: int, offset: int) -> bytes:
    try:
        with file.open("rb") as opened:
            opened.seek(offset - _RECORD.size)
            found = next(_records(opened), None)
    except OSError as error:
        raise InputError(f"spool {file}", f"message {place}", str(error.strerror), _REMEDY) from None
    if found is None or found[0] != place:
        raise InputError(f"spool {file}, message {place}", "the bytes that were written", "others", _REMEDY)
    return found[2]
