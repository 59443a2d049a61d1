"""How much memory is free, and giving back what is not needed; imports no torch."""

import mmap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


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


def give_back_pages(array: "np.ndarray") -> None:
    """Let go of the pages that this process has read of a file mapped into memory; other arrays stay as they are.

    They would count as this process's memory, up to the size of the file, until the system runs short. The system's
    file cache keeps them: reading one again costs a page fault, not the disk.
    """
    mapping = getattr(array, "_mmap", None)  # NumPy's memmap alone has it
    # Only of a read-only mapping: what was written to a private one would be lost.
    if mapping is not None and getattr(array, "mode", None) == "r" and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        mapping.madvise(mmap.MADV_DONTNEED)
