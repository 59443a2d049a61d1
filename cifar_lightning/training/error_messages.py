"""Messages for known errors of torch and the system: disk full, out of memory, dead workers."""

import contextlib
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler

from cifar_lightning.data.memory import is_out_of_memory
from cifar_lightning.errors import RunError, UserError
from cifar_lightning.files import FULL
from cifar_lightning.formatting import clipped, raised_by, reason_of, shell_line
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.run_recorder import RunRecorder

_LESS_MEMORY = {
    "fit": "halve --batch_size and give --trainer.accumulate_grad_batches 2, which trains the same; "
    "--data.eval_batch_size for validation and test",
    "tune": "halve --batch_size",
}


# Functions of Lightning, torch and ours that put the state of a checkpoint in place.
_RESTORING = {"resume_start", "_restore_modules_and_callbacks", "restore_model", "restore_training_state"}
_RESTORING |= {"restore_rng", "restore", "load_state_dict", "on_load_checkpoint"}

# What the Trainer raises for an unknown accelerator or strategy, a wrong type, a missing package.
_OF_SETTINGS = (ValueError, TypeError, ImportError, MisconfigurationException)
_WRAPPED = re.compile("Does not validate against|Problem with given class_path")  # by jsonargparse, for each type
_OF_USERS = (pl.Callback, Logger, Profiler)


@contextlib.contextmanager
def explained(command: str, run: RunFolder | None = None) -> Iterator[None]:
    """Raise known errors as ours; see `explain`."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        known = explain(error, command, run)
        if known is None:
            raise
        raise known from error


@contextlib.contextmanager
def restoring(path: str | Path | None) -> Iterator[None]:
    """Raise what restoring the state of a checkpoint raises as `UserError`; what training raises stays as it is."""
    try:
        yield
    except (UserError, RunError):
        raise
    # A state of another type may raise anything, and Lightning restores and trains in one call: only the traceback says
    # which of both failed.
    except Exception as error:
        names = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
        if path is None or not names & _RESTORING:
            raise
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise UserError(
            f"{path}: its state cannot be restored ({reason}).\nIt is damaged, or of another version. Start a new run: "
            f"fit --init_weights {shell_line(str(path))}"
        ) from error


@contextlib.contextmanager
def of_settings() -> Iterator[None]:
    """Raise the Trainer's errors about a setting as `UserError`."""
    try:
        yield
    except UserError:
        raise
    except _OF_SETTINGS as error:
        raise UserError(f"--trainer: {cause_of(error)}") from error


@contextlib.contextmanager
def of_users_objects(recorder: RunRecorder | None = None) -> Iterator[None]:
    """Raise as `UserError` what a callback, logger or profiler of the user raises before training begins.

    Afterwards, and of our own code, the traceback is what helps.
    """
    try:
        yield
    except (OSError, RunError, UserError):  # `main` reports them
        raise
    except Exception as raised:  # a class of the user's raises anything
        error: BaseException = raised
        while error.__cause__ is not None and _WRAPPED.match(str(error)):
            error = error.__cause__
        selves = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        kinds = [type(self) for self in selves if isinstance(self, _OF_USERS)]
        names = [f"{kind.__name__}: " for kind in kinds if not kind.__module__.startswith("cifar_lightning.")]
        if (recorder is not None and recorder.has_begun) or not (names or isinstance(error, ImportError)):
            raise
        raise UserError(f"{''.join(names[:1])}{cause_of(error)}") from error


def cause_of(error: BaseException) -> str:
    """Return what an exception says on one line, with the install command of a package that is missing."""
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name and "pip install" not in text:
        text = f"{text.rstrip('.')}; pip install {error.name.partition('.')[0]}"
    if not isinstance(error, _OF_SETTINGS) or not text:  # a KeyError says no more than the key
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return clipped(text, 450)


def explain(error: RuntimeError | OSError, command: str, run: RunFolder | None = None) -> RunError | UserError | None:
    """Return a known error as a message with a way out, None for any other."""
    text = " ".join(str(error).split())
    if isinstance(error, RunError):
        return None
    if "multiple optimizers is only supported with manual" in text:  # Lightning's, of configure_optimizers
        return UserError(
            "configure_optimizers returns several optimizers; return one, with several groups of parameters."
        )
    if isinstance(error, OSError):
        if error.errno in FULL:
            where = error.filename or ("a file of the run" if run else "a file")
            text = f"{where}: cannot be written ({error.strerror})"
            text += "" if error.filename else ", or stdout cannot"
            return RunError(f"{text}.\nMake room. {_way_on(run)}")
        # `main` reports files that a user named.
        return RunError(f"{error.filename}: {error.strerror}.\n{_way_on(run)}") if run and error.filename else None
    if "view size is not compatible with input tensor's size and stride" in text:
        return UserError(
            f"view of a tensor that is not contiguous ({raised_by(error)}), as activations in channels_last are not.\n"
            "Call reshape or flatten, or give --model.memory_format contiguous."
        )
    if is_out_of_memory(error):
        less = _LESS_MEMORY.get(command, "lower --data.eval_batch_size")
        inside = "; with another --batch_size only from the end of an epoch"
        return RunError(f"out of memory: {less}.\n{_way_on(run, inside)}")
    # An assert on the device is of an index in somebody's code, to which the traceback leads.
    if isinstance(error, torch.AcceleratorError) and "device-side assert" not in text:
        reason = clipped(str(error).partition("\n")[0].rstrip("."), 120)
        return RunError(
            f"the GPU failed ({reason}).\nLook at nvidia-smi, or give --trainer.accelerator cpu. {_way_on(run)}"
        )
    if "DataLoader worker" in text:
        return RunError(
            f"a loader's worker process died ({text[:120]}).\n"
            f"Memory may have run out: fewer --data.num_workers. {_way_on(run)}"
        )
    return None


def _way_on(run: RunFolder | None, provided: str = "") -> str:
    if run is not None and run.resumed_checkpoint.exists():
        return f"Checkpoints are kept: {run.resume_command} resumes{provided}."
    return "No checkpoint was written yet: start again." if run else "Then start again."
