"""A measurement's median with its spread, and results as JSON with machine, commit and versions."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.hardware import hardware_name
from cifar_lightning.runs.environment import describe_environment


def spread(values: Sequence[float], decimals: int = 1) -> str:
    """Return "median (lowest to highest)"."""
    median, low, high = (f"{of(values):,.{decimals}f}" for of in (statistics.median, min, max))
    return f"{median} ({low} to {high})"


def print_rates(rates: dict[str, list[float]]) -> None:
    """Print the images/s of each loader."""
    for name, values in rates.items():
        print(f"  {name:<12} {statistics.median(values):9,.0f}  ({min(values):,.0f} to {max(values):,.0f})")


def write_results(path: Path | None, **results: Any) -> None:
    """Write results with the machine, commit and versions that they are of, if `--json` named a file."""
    if path is not None:
        environment = describe_environment()
        about = {key: environment[key] for key in ("commit", "dirty", "versions")}
        about["hardware"] = hardware_name()
        path.write_text(json.dumps({**about, **results}, indent=2) + "\n", encoding="utf-8")
