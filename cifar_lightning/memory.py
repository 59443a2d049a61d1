"""How much memory is free; imports no torch."""

from pathlib import Path


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
