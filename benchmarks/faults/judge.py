"""What the rows compare: output and exit status of a program, resumed steps, differences of checkpoints."""

import json
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Done:
    """Exit status (negative for a signal) and output of a finished program."""

    status: int
    stdout: str
    stderr: str


def unclear(done: Done, *names: str) -> str:
    """Return why a failure is not clearly reported; empty if it is.

    Args:
        done: The program that failed.
        *names: What its stderr must name.
    """
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.status == 0:
        return "exit status 0"
    if done.status < 0:
        return f"killed by {signal.Signals(-done.status).name}"
    if "Traceback" in done.stderr + done.stdout:
        last = lines[-1].strip() if lines else ""
        return f"a traceback of {len(lines)} lines ({last[:100]})"
    if not 1 <= len(lines) <= 3:
        return f"{len(lines)} lines on stderr"
    missing = [name for name in names if name.lower() not in done.stderr.lower()]
    return f"stderr does not name {missing[0]!r}: {' / '.join(lines)[:200]}" if missing else ""


class Payload:
    """An object whose unpickling runs code: it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of nested dicts, lists and tuples with its name."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            short = re.sub(r"\{.*\}", "", Path(key).name) if isinstance(key, str) else key  # some keys hold paths
            yield from leaves(value, f"{name}.{short}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{name}.{index}")
    else:
        yield name, tree


def differences(one: Any, other: Any) -> list[str]:
    """Return the names of the leaves that differ: tensors are compared by bits, paths by their last part."""
    import torch

    def bits(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (
                value.dtype,
                tuple(value.shape),
                value.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes(),
            )
        return Path(value).name if isinstance(value, str) and "/" in value else repr(value)

    ours, theirs = ({name: bits(value) for name, value in leaves(tree)} for tree in (one, other))
    names = {**ours, **theirs}
    return [name for name in names if name not in ours or name not in theirs or ours[name] != theirs[name]]


def last_resume(run: Path) -> dict[str, Any]:
    """Return the entry of a run's latest resume, with `step` and `changed`; empty if it was never resumed."""
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    return environment.get("resumed", [{}])[-1]


def load(path: Path) -> Any:
    """Load a checkpoint with `weights_only=True`."""
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)
