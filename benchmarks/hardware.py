"""The machine that results are of, and the rule that a results file never mixes two machines unseen.

A file of one measurement is of one machine: `results_file` refuses one of another. In a file that collects runs each
line has its `hardware`, and whoever reads it takes the lines of one machine at a time.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cifar_lightning.runs.environment import describe_environment, processor_name


def hardware_name(environment: Mapping[str, Any] | None = None) -> str:
    """Return cores, processor and GPU of this machine, or of the one that a run's environment.json describes.

    Such as "2 cores of AMD EPYC (AVX2), no GPU".
    """
    if environment is None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        environment = describe_environment() | {"device": device}
    gpu = "no GPU" if environment["device"] == "cpu" else environment["device"]
    return f"{environment['num_usable_cpus']} cores of {processor_name(environment)}, {gpu}"


def results_file(text: str) -> Path:
    """Return the path of `--json FILE`, the type of that argument.

    Raises:
        argparse.ArgumentTypeError: The file has results of another machine, or is none of results.
    """
    path = Path(text)
    if not path.exists():
        return path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        lines = content if isinstance(content, list) else [content]
        found = {line["hardware"] for line in lines}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise argparse.ArgumentTypeError(
            f"{text}: no file of results ({type(error).__name__}: {error}). Name another file"
        ) from error
    if others := sorted(found - {hardware_name()}):
        raise argparse.ArgumentTypeError(
            f"{text}: has results of {others[0]}; this machine is {hardware_name()}. Name another file"
        )
    return path
