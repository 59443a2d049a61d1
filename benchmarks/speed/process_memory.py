"""Memory of a process and its workers, from Linux's /proc."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

IS_KNOWN = Path("/proc/self/smaps_rollup").exists()


@dataclass(frozen=True)
class Memory:
    """Megabytes (10^6 bytes) of several processes together; shared pages count once.

    Args:
        total_mb: Sum of the processes' PSS.
        mapped_mb: Of that, pages of mapped files, which the system can reclaim.
    """

    total_mb: float
    mapped_mb: float

    @property
    def own_mb(self) -> float:
        """Memory that is not of mapped files."""
        return self.total_mb - self.mapped_mb


def memory_of(pids: Sequence[int]) -> Memory:
    """Return the memory of some processes by their ids; `OSError` if one has ended."""
    sums = {"Pss": 0, "Pss_File": 0}
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]:
            name, kilobytes = line.split()[:2]
            if (key := name.rstrip(":")) in sums:
                sums[key] += int(kilobytes)
    return Memory(sums["Pss"] * 1024 / 1e6, sums["Pss_File"] * 1024 / 1e6)
