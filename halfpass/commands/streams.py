"""Standard output and error that a run outlives: their reader may go (`| head`, a pager or terminal that is closed), or
their disk may be full."""

import errno
import io
import sys
from contextlib import suppress
from typing import Any

_READER_IS_GONE = (errno.EPIPE, errno.EIO)


class Lasting(io.FileIO):
    """What cannot be written is lost, and nothing else; `failure` says why where it was not for want of a reader."""

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:  # never less than all, as these descriptors block
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _READER_IS_GONE:
                self.failure = error
            return memoryview(data).nbytes


def outlive() -> None:
    """From now on the two are such. What somebody has put in their place stays."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.reconfigure(errors="replace")  # a dash that the locale does not have ends no run
        with suppress(OSError, ValueError):  # it was closed
            if type(stream) is not io.TextIOWrapper or stream.fileno() != number:
                continue
            stream.flush()
            buffer = io.BufferedWriter(Lasting(number, "w", closefd=False))
            lasting = io.TextIOWrapper(
                buffer, stream.encoding, "replace", line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )  # fmt: skip
            setattr(sys, name, lasting)


def lost_output() -> OSError | None:
    """Why standard output is not whole, where its reader would want it."""
    if sys.stdout is None:  # it was closed before the command began
        return None
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.failure if isinstance(raw, Lasting) else None
