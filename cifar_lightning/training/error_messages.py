"""Messages for known errors of torch and the system: disk full, out of memory, dead workers."""

import contextlib
import errno
from collections.abc import Iterator

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from cifar_lightning.errors import RunError, UserError
from cifar_lightning.formatting import clipped
from cifar_lightning.runs.folder import RunFolder

_FULL = (errno.ENOSPC, errno.EDQUOT)
_LESS_MEMORY = {
    "fit": "halve --batch_size and give --trainer.accumulate_grad_batches 2, which trains the same; "
    "--data.eval_batch_size for validation and test",
    "tune": "halve --batch_size",
}


# What the Trainer raises for an unknown accelerator or strategy, a wrong type, a missing package.
_OF_SETTINGS = (ValueError, TypeError, ImportError, MisconfigurationException)


@contextlib.contextmanager
def explained(command: str, run: RunFolder | None = None) -> Iterator[None]:
    """Raise known errors as `RunError`; see `explain`."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        known = explain(error, command, run)
        if known is None:
            raise
        raise known from error


@contextlib.contextmanager
def of_settings() -> Iterator[None]:
    """Raise the Trainer's errors about a setting as `UserError`."""
    try:
        yield
    except UserError:
        raise
    except _OF_SETTINGS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"--trainer: {clipped(lines[0], 300)}") from error


def explain(error: RuntimeError | OSError, command: str, run: RunFolder | None = None) -> RunError | None:
    """Return a known error as a message with a way out, None for any other."""
    text = " ".join(str(error).split())
    if isinstance(error, RunError):
        return None
    if isinstance(error, OSError):
        if error.errno in _FULL:
            where = error.filename or ("a file of the run" if run else "a file")
            return RunError(f"{where}: cannot be written ({error.strerror}).\nMake room. {_way_on(run)}")
        # `main` reports files that a user named.
        return RunError(f"{error.filename}: {error.strerror}.\n{_way_on(run)}") if run and error.filename else None
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        less = _LESS_MEMORY.get(command, "lower --data.eval_batch_size")
        inside = "; with another --batch_size only from the end of an epoch" if _is_resumable(run) else ""
        return RunError(f"out of memory: {less}.\n{_way_on(run, inside)}")
    if "DataLoader worker" in text:
        return RunError(
            f"a loader's worker process died ({text[:120]}).\n"
            f"Memory may have run out: fewer --data.num_workers. {_way_on(run)}"
        )
    return None


def _is_resumable(run: RunFolder | None) -> bool:
    return run is not None and run.resumed_checkpoint.exists()


def _way_on(run: RunFolder | None, provided: str = "") -> str:
    if run is not None and _is_resumable(run):
        return f"Checkpoints are kept: {run.resume_command} resumes{provided}."
    return "No checkpoint was written yet: start again." if run else "Then start again."
