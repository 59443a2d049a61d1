"""What errors of torch and of the system mean to the person whose run they ended."""

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
    "fit": "halve --batch_size and give --trainer.accumulate_grad_batches 2, which trains alike; "
    "--data.eval_batch_size for validation and test",
    "tune": "halve --batch_size",
}


# What the Trainer raises for an unknown accelerator or strategy, a value of the wrong kind, a package that is missing.
_OF_SETTINGS = (ValueError, TypeError, ImportError, MisconfigurationException)


@contextlib.contextmanager
def explained(command: str, run: RunFolder | None = None) -> Iterator[None]:
    """Raise what is known of the errors inside as `RunError`; see `explain`."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        known = explain(error, command, run)
        if known is None:
            raise
        raise known from error


@contextlib.contextmanager
def of_settings() -> Iterator[None]:
    """Raise errors of making the Trainer that come of a setting as `UserError`; others, mistakes here, stay."""
    try:
        yield
    except UserError:
        raise
    except _OF_SETTINGS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"--trainer: {clipped(lines[0], 300)}") from error


def explain(error: RuntimeError | OSError, command: str, run: RunFolder | None = None) -> RunError | None:
    """Return the error in a person's words, with a way out; None for one that is not known, such as a mistake here.

    Args:
        error: What ended the command.
        command: fit, validate, test, predict or tune.
        run: The run that `fit` had begun, which from then on may be gone on with.
    """
    text = " ".join(str(error).split())
    if isinstance(error, RunError):  # in words already
        return None
    if isinstance(error, OSError):
        if error.errno in _FULL:
            where = error.filename or ("a file of the run" if run else "a file")
            return RunError(f"{where}: cannot be written ({error.strerror}).\nMake room. {_way_on(run)}")
        # Of files that a user named, or of no file at all, `main` knows more; the run's own were in order at its start.
        return RunError(f"{error.filename}: {error.strerror}.\n{_way_on(run)}") if run and error.filename else None
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        less = _LESS_MEMORY.get(command, "lower --data.eval_batch_size")
        inside = "; with another --batch_size only from an epoch's end" if _is_resumable(run) else ""
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
        return f"Checkpoints are kept: {run.resume_command} goes on{provided}."
    return "No checkpoint was written yet: start again." if run else "Then start again."
