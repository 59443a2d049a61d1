"""Checkpoints that survive a crash or power cut: `DurableCheckpointIO`, and the newest intact one of a run.

A checkpoint is written to a temporary file in the same folder, synced, renamed, and the folder synced: its name always
refers to either the whole old file or the whole new one. The one before is kept as previous.ckpt.
"""

import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from cifar_lightning.checkpoints.checksum import add_checksum
from cifar_lightning.checkpoints.loading import UnreadableError, read_checkpoint, require_resumable
from cifar_lightning.errors import RunError, UserError
from cifar_lightning.files import make_folder, write_bytes_durably
from cifar_lightning.runs.folder import RunFolder


class DurableCheckpointIO(CheckpointIO):
    """Lightning plugin that writes checkpoints durably and with a checksum, and loads them with `weights_only=True`."""

    def __init__(self) -> None:
        self._never_finite = frozenset[str]()

    def note_start(self, state_dict: Mapping[str, Any]) -> None:
        """Note what has NaN or infinity before training, as masks of attention have: only the rest is checked."""
        self._never_finite = frozenset(name for name, value in state_dict.items() if not _is_finite(value))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint, or leave the old file; a replaced last.ckpt becomes previous.ckpt.

        Raises:
            RunError: The file cannot be written, weights are not finite, or it could not be loaded; the old file is
                intact.
        """
        target = Path(path)
        weights = checkpoint["state_dict"].items()
        bad = [name for name, value in weights if name not in self._never_finite and not _is_finite(value)]
        if bad:
            raise RunError(
                f"{target}: not written, as {bad[0]} has NaN or infinity after step {checkpoint['global_step']}; "
                "earlier checkpoints are unchanged.\nLower --lr, or clip with --trainer.gradient_clip_val 1."
            )
        buffer = BytesIO()
        torch.save(checkpoint, buffer)
        _require_loadable(checkpoint, buffer, target)  # each time: a callback's best is None before it is a number
        run = RunFolder(target.parent.parent)
        try:
            make_folder(target.parent)
            keep_as = run.previous_checkpoint if target == run.last_checkpoint else None
            write_bytes_durably(target, add_checksum(buffer.getvalue()), keep_as=keep_as)
        except OSError as error:
            then = f", then: {run.resume_command}" if run.resumed_checkpoint.exists() else "."
            raise RunError(
                f"{target}: cannot be written ({error.strerror}).\nFree disk space or fix the permissions{then}"
            ) from error

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU; see `read_checkpoint`."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


def _is_finite(value: Any) -> bool:
    return not (isinstance(value, Tensor) and value.is_floating_point()) or bool(value.isfinite().all())


def _require_loadable(checkpoint: dict[str, Any], saved: BytesIO, target: Path) -> None:
    """Raise if a checkpoint holds more than tensors and plain types, and name the states that do."""
    kinds = _not_plain(saved)
    if not kinds:
        return
    states, where = {**checkpoint, **checkpoint.get("callbacks", {})}, list[str]()
    for name in states.keys() - {"callbacks"}:
        torch.save(states[name], alone := BytesIO())
        where += [name] if _not_plain(alone) else []
    raise RunError(
        f"{target}: not written, as {', '.join(sorted(where))} has {', '.join(sorted(kinds))}, and it could not be "
        "loaded.\nKeep only tensors, numbers, strings, lists and dicts there: float(x) of a NumPy number."
    )


def _not_plain(saved: BytesIO) -> list[str]:
    saved.seek(0)
    return get_unsafe_globals_in_checkpoint(saved)


def newest_checkpoint(run: RunFolder) -> tuple[Path, dict[str, Any], list[tuple[Path, str]]]:
    """Read the newest intact checkpoint of a run: last.ckpt, previous.ckpt or best.ckpt.

    Returns:
        Path and content, and path and error of each newer one that is damaged or missing.

    Raises:
        UserError: There is none, or the newest cannot be read now.
    """
    damages: list[tuple[Path, str]] = []
    for path in run.resumed_checkpoints:
        if not path.exists():
            continue
        try:
            checkpoint = read_checkpoint(path)
        except UnreadableError:  # it may be intact, so an older one must not replace it
            raise
        except UserError as error:
            damages.append((path, str(error)))
        else:
            require_resumable(checkpoint, path)
            if not run.last_checkpoint.exists():
                damages.insert(0, (run.last_checkpoint, f"{run.last_checkpoint} is missing."))
            return path, checkpoint, damages
    if not damages:
        run.require(run.last_checkpoint)
    raise UserError(f"{damages[0][1]}\nNo other checkpoint in {run.checkpoints} can be read; start a new run.")
