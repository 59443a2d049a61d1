"""Memory and CPUs of this machine, and how many worker processes they suggest. Imports no torch."""

import ctypes
import math
import mmap
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_lightning.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

# Of the allocators of CPUs, on Linux and macOS or on Windows, and of Apple's GPU; CUDA's has a class of its own.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory: you tried",
    "MPS backend out of memory",
    "Invalid buffer size: ",  # of MPSAllocator.mm, for one tensor
    "CUDA error: out of memory",  # of the driver
    "_STATUS_ALLOC_FAILED",  # of cuBLAS and cuDNN
)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # glibc's malloc.h
_CGROUP = Path("/sys/fs/cgroup")
_MOST_BYTES = 2**31 - 1  # mallopt takes an int


def usable_cpus() -> int:
    """Return the number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_num_workers(num_bytes: float, free_bytes: float) -> int:
    """Return the default of `--data.num_workers`: 0 where the images fit in half of the free memory, otherwise 2.

    The other half is for the model, its activations and other programs. With one CPU, 1 worker instead of 2. `doctor`
    reports this choice.
    """
    return 0 if num_bytes < free_bytes / 2 else min(2, usable_cpus())


def free_device_bytes(device: "torch.device") -> float:
    """Return the free memory of a CUDA device; for other devices that of the host."""
    if device.type != "cuda":
        return free_host_bytes()
    import torch

    return float(torch.cuda.mem_get_info(device)[0])


def free_host_bytes() -> float:
    """Return the free memory of the machine or container in bytes; 8e9 on systems other than Linux."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 8e9  # the standard library does not know it outside Linux: a small laptop's memory
    free = next(1024.0 * int(line.split()[1]) for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
    return min(free, _free_in_container(_CGROUP))  # a container may have less than its machine


def exceeds_free(num_bytes: float) -> bool:
    """Whether so many bytes are more than the free memory, which only Linux tells."""
    return sys.platform == "linux" and num_bytes > free_host_bytes()


def is_out_of_memory(error: Exception) -> bool:
    """Whether PyTorch could not allocate memory, of a GPU or of the host."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def check_fits(shape: tuple[int, ...], what: str, way_out: str) -> None:
    """Raise `UserError` where decoded images, uint8 of this shape, need more memory than is free."""
    if exceeds_free(needed := math.prod(shape)):
        raise UserError(
            f"{what}: {shape[0]:,} images of {shape[1]} pixels need {needed / 1e9:,.1f} GB of memory, more than is "
            f"free.\n{way_out}"
        )


def _free_in_container(cgroup: Path) -> float:
    """Return the bytes that are left to a container of Linux; infinite where it has no limit of its own.

    What it has read from disks counts as used until the kernel needs the room, so that the inactive part of it is free:
    Docker and Kubernetes subtract the same.
    """
    limit, used, parts = (cgroup / f"memory.{name}" for name in ("max", "current", "stat"))
    if not limit.exists() or limit.read_text().strip() == "max":
        return math.inf
    of_part = dict(line.split() for line in parts.read_text().splitlines())
    return float(limit.read_text()) - float(used.read_text()) + float(of_part["inactive_file"])


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep freed memory in the process instead of returning it to the system.

    By default glibc maps arrays of 32 MB or more again each time and the kernel zeroes their pages, which takes up to
    40 % of a training step on a CPU, whose activations are that large (SpeedNet, batch 1,000, 2 cores:
    benchmarks/LOG.md). Peak memory grows by up to 15 %. Does nothing with other C libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, _MOST_BYTES)
    libc.mallopt(_TOP_PAD, 64 << 20)  # of each growth, so that there are few


def give_back_pages(array: "np.ndarray") -> None:
    """Release the pages that this process has read of a memory-mapped file; do nothing for other arrays.

    They would count as this process's memory, up to the size of the file, until the system runs short. They stay in
    the system's file cache: reading one again costs a page fault, not a disk access.
    """
    mapping = getattr(array, "_mmap", None)  # only np.memmap has it
    # Read-only mappings alone: what was written to a private one would be lost.
    if mapping is not None and getattr(array, "mode", None) == "r" and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        mapping.madvise(mmap.MADV_DONTNEED)
