"""How much memory is free, keeping what is needed again and giving back what is not; imports no torch."""

import ctypes
import mmap
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # glibc's malloc.h
_MOST_BYTES = 2**31 - 1  # mallopt takes an int


def free_host_bytes() -> float:
    """Return the bytes of memory that a program may still take; 8e9 where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 8e9  # the standard library does not tell outside Linux: a small laptop's memory
    free = next(1024.0 * int(line.split()[1]) for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text().strip() != "max":  # a container may have less than its machine
        free = min(free, float(limit.read_text()) - float(used.read_text()))
    return free


def keep_freed_memory() -> None:
    """Let this process keep what it frees for its next step, instead of giving it back to the system.

    glibc maps an array of 32 MB or more anew each time, and the kernel zeroes its pages: of a training step on a CPU,
    whose activations are that large, up to 40 % of the time. The memory at its peak is up to 15 % more. Other C
    libraries and systems stay as they are. (SpeedNet, batch 1,000, 2 cores: benchmarks/LOG.md.)
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, _MOST_BYTES)
    libc.mallopt(_TOP_PAD, 64 << 20)  # of each growth, so that there are few


def give_back_pages(array: "np.ndarray") -> None:
    """Let go of the pages that this process has read of a file mapped into memory; other arrays stay as they are.

    They would count as this process's memory, up to the size of the file, until the system runs short. The system's
    file cache keeps them: reading one again costs a page fault, not the disk.
    """
    mapping = getattr(array, "_mmap", None)  # NumPy's memmap alone has it
    # Only of a read-only mapping: what was written to a private one would be lost.
    if mapping is not None and getattr(array, "mode", None) == "r" and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        mapping.madvise(mmap.MADV_DONTNEED)
