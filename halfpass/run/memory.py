"""A process's memory: its peak above what it held before its first batch, and what malloc does with freed blocks."""

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


class PeakMemory:
    """Start it after everything is loaded and built; `peak_bytes()` then gives the peak since, above the start.

    On a GPU it is what PyTorch has taken from the device: that counts what the graph of a recorded step keeps
    for itself, which what is allocated does not, and blocks that are kept for reuse. On the CPU it is the resident set:
    on Linux the kernel's own high-water mark, reset at the start; elsewhere the peak of all time, which misses
    what stays below the peak of loading.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._start = torch.cuda.memory_reserved(device)
        else:
            _give_back_freed_memory()
            _reset_high_water_mark()
            self._start = _status_bytes("VmRSS") or _peak_of_all_time()

    def peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device) - self._start
        return max(0, (_status_bytes("VmHWM") or _peak_of_all_time()) - self._start)


def keep_freed_memory() -> None:
    """Has this process's malloc keep what is freed for the tensors to come.

    Else a training step gives megabytes back to the system and takes them again page by page: 10,000 page faults a
    step of ResNet-20's client half, and 15 % of its time. Only glibc's malloc is told so; others do as they do.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the most it takes; larger blocks are mapped and given back
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _give_back_freed_memory() -> None:
    """Else what loading freed is still resident, and training fills it without a trace."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc has it, others may not
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water_mark() -> None:
    with contextlib.suppress(OSError):  # not Linux, or not allowed; the class says what the figure means then
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): 5 resets the peak resident set size


def _status_bytes(key: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    values = [line.split()[1] for line in status.splitlines() if line.startswith(f"{key}:")]
    return int(values[0]) * 1024 if values else None


def _peak_of_all_time() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
