"""The run folder shared by all processes of a run."""

import os
from pathlib import Path

from cifar_lightning.errors import UserError

RUN_OF_FIRST = "CIFAR_LIGHTNING_RUN_DIR"


NEEDS_RUN_DIR = "several processes started from outside (torchrun, SLURM) need one --run_dir for all."


def announce_run(path: Path) -> None:
    """Pass the run folder to the processes that Lightning's launcher starts, which run the same command."""
    os.environ[RUN_OF_FIRST] = str(path)


def announced_run(given: str | Path | None) -> Path:
    """Return the run folder that the first process announced, or else the one given by --run_dir."""
    chosen = os.environ.get(RUN_OF_FIRST) or given
    if chosen is None:
        raise UserError(NEEDS_RUN_DIR)
    return Path(chosen)


def is_started_from_outside() -> bool:
    """Return whether torchrun or SLURM has started several processes, which do not know each other's run folder."""
    counts = {"TORCHELASTIC_RUN_ID": "WORLD_SIZE", "SLURM_PROCID": "SLURM_NTASKS"}
    return any(mark in os.environ and int(os.environ.get(count, "1")) > 1 for mark, count in counts.items())
