"""Benchmarks of speed, faults and accuracy: `python -m benchmarks.speed.loader` ..., from the repository root."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS, RESULTS = ROOT / "configs", ROOT / "benchmarks" / "results"


def python_path(checkout: Path = ROOT) -> str:
    """Return the PYTHONPATH of a new process that imports from a checkout of this repository."""
    return os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
