"""How much memory a process and its workers take, from Linux's /proc."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

IS_KNOWN = Path("/proc/self/smaps_rollup").exists()


@dataclass(frozen=True)
class Memory:
    """Megabytes (10^6 bytes) of several processes together, pages that they share counted once.

    Args:
        total_mb: All of it, the sum of the processes' PSS.
        mapped_mb: Of that, pages of mapped files: they are on the disk, and the system takes them back when it must.
    """

    total_mb: float
    mapped_mb: float

    @property
    def own_mb(self) -> float:
        """What the processes hold for themselves or share between them, and no file has."""
        return self.total_mb - self.mapped_mb


def memory_of(workers: Sequence[int]) -> Memory:
    """Return the memory of this process and some others."""
    sums = {"Pss": 0, "Pss_File": 0}
    for pid in (os.getpid(), *workers):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]:
            name, kilobytes = line.split()[:2]
            if (key := name.rstrip(":")) in sums:
                sums[key] += int(kilobytes)
    return Memory(sums["Pss"] * 1024 / 1e6, sums["Pss_File"] * 1024 / 1e6)
