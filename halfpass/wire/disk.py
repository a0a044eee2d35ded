"""Files that grow by records: what the store of uploads and the spool of an outbox have in common."""

import os
from contextlib import suppress
from pathlib import Path


def append(file: Path, size: int, *parts: bytes) -> None:
    """Writes a record, in its parts, at `size`, over what a killed process may have left there; on failure nothing of
    it stays. Raises OSError."""
    with suppress(FileNotFoundError):
        os.truncate(file, size)
    try:
        write_at(file, size, *parts)
    except OSError:
        with suppress(FileNotFoundError):
            os.truncate(file, size)
        raise


def write_at(file: Path, at: int, *parts: bytes) -> None:
    """Writes there, over what is there, and leaves what is behind it. Raises OSError."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        for part in parts:
            view, written = memoryview(part), 0
            while written < len(view):
                written += os.pwrite(descriptor, view[written:], at + written)
            at += written
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
