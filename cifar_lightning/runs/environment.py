"""The environment of a run: versions, machine, commit and command."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar_lightning.runs.schema import SCHEMA_VERSION

_START = r"(?<![\w~.:/])"  # of an absolute path, also within a sentence; not of a URL or of the rest of a path
_FOLDERS = re.compile(rf"{_START}/(?:[^/\s]+/)+")
# Those of Windows, also with backslashes that are escaped; on other systems a regular expression may look like one.
_DRIVE, _SHARE, _PART = r"[A-Za-z]:(?:/(?!/)|\\+)", r"(?<!\\)\\{2,}", r"(?:[^/\\\s]+[/\\]+)"
_WINDOWS_FOLDERS = re.compile(rf"{_START}(?:{_DRIVE}{_PART}+|{_SHARE}{_PART}{{2,}})")
# Flags of Linux's /proc/cpuinfo for what decides about a CPU's speed and rounding, the widest first.
_INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
_DISTRIBUTIONS = ("cifar-lightning", "torch", "torchvision", "lightning", "torchmetrics", "numpy")


def describe_environment() -> dict[str, Any]:
    """Return the content of environment.json; the caller adds device and precision.

    `commit` and `dirty` are None unless the package runs from a git checkout that tracks it.
    """
    commit, dirty = _describe_checkout(Path(__file__))
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": {"python": platform.python_version()} | {name: version_of(name) for name in _DISTRIBUTIONS},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_instructions": _cpu_instructions(),
        "num_cpus": os.cpu_count(),
        "num_usable_cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "commit": commit,
        "dirty": dirty,
        "command": portable([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
    }


def version_of(distribution: str) -> str | None:
    """Return the installed version of a distribution; None if it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return None


@functools.cache
def package_version() -> str | None:
    """Return the installed version of this project; None if it is not installed."""
    return version_of("cifar-lightning")


def portable(value: Any) -> Any:
    """Return settings without the folders of this machine, which would tell a user's name.

    A path below the current folder becomes relative to it, one below the home folder begins with ~, and of any other
    absolute path the name is left.
    """
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(portable, value))
    if not isinstance(value, str):
        return value
    for folder, short in ((os.getcwd(), ""), (os.path.expanduser("~"), "~/")):
        if len(folder) > 1:
            start = _START + re.escape(folder).replace(r"\\", r"[/\\]+")
            value = re.sub(rf"{start}[/\\]+", short, value)
            value = re.sub(f"{start}$", short.rstrip("/") or ".", value)
    value = _FOLDERS.sub("", value)
    return _WINDOWS_FOLDERS.sub("", value) if sys.platform == "win32" else value


def processor_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return how the processor of a resumed run differs from that of its last process; empty if it does not.

    Another kind of processor, number of threads or version of torch rounds differently.
    """
    resumed = before.get("resumed") or []
    last = before | resumed[-1] if resumed else before
    if last.get("cpu_instructions") is None:  # a run of an earlier version
        now = {key: value for key, value in now.items() if key != "cpu_instructions"}
    then, today = _processor(last), _processor(now)
    return f"{today} instead of {then}" if "device" in before and then != today else ""


def inexact_resumes(environment: Mapping[str, Any]) -> list[str]:
    """Return for each resume on another processor how it differs, which makes the run not bitwise."""
    entries = environment.get("resumed") or []
    return [f"not bitwise: {entry['processor_change']}" for entry in entries if entry.get("processor_change")]


def _processor(environment: Mapping[str, Any]) -> str:
    device, torch_version = environment.get("device"), (environment.get("versions") or {}).get("torch")
    if device == "cpu":  # whose threads sum in another order
        device = f"{processor_name(environment)} with {environment.get('num_threads')} threads"
    return f"{device}, torch {torch_version}"


def _describe_checkout(tracked_file: Path) -> tuple[str | None, bool | None]:
    # Inside a git hook GIT_DIR and the like point at another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tracked_file.parent), *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, check=True, timeout=10, encoding="utf-8", errors="replace"
        ).stdout.strip()

    try:
        # A package installed into a virtual environment inside some checkout is not of that checkout.
        git("ls-files", "--error-unmatch", tracked_file.name)
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def processor_name(environment: Mapping[str, Any]) -> str:
    """Return the processor that environment.json has, such as "AMD EPYC (AVX2)": one name may stand for several."""
    instructions = environment.get("cpu_instructions")
    return f"{environment.get('cpu')} ({instructions})" if instructions else str(environment.get("cpu"))


def _cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration, subprocess.SubprocessError):  # ARM machines list no model name
        if platform.system() == "Linux":
            return _cpuinfo("model name")
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, check=True, timeout=10, text=True).stdout.strip()
    return platform.processor() or platform.machine()


def _cpu_instructions() -> str | None:
    with contextlib.suppress(OSError, StopIteration):
        flags = _cpuinfo("flags").split()
        return next(name for flag, name in _INSTRUCTIONS.items() if flag in flags)
    return None


def _cpuinfo(field: str) -> str:
    """Return a field of the first processor in Linux's list; `StopIteration` where it has none of this name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(field))
