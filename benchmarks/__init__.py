"""Benchmarks of speed, faults and accuracy: `python -m benchmarks.speed.loader` ..., from the repository root."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS, RESULTS = ROOT / "configs", ROOT / "benchmarks" / "results"


def python_path(checkout: Path = ROOT) -> str:
    """Return the PYTHONPATH of a new process that imports from a checkout of this repository."""
    return os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])


def execute(command: Sequence[str]) -> None:
    """Run a command without its output; where it fails, exit with its status and its last lines."""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)
    if done.returncode != 0:
        print("\n".join(done.stderr.strip().splitlines()[-5:]), file=sys.stderr)
        sys.exit(done.returncode)
