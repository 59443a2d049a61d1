"""Checkpoints that outlast a power cut, and last.ckpt: when it is written, and how a signal ends a run.

A checkpoint is written beside its target, put on the disk, renamed, and the folder put on the disk: whatever happens,
under its name lies either the old one or the new one, whole. The one before stays as previous.ckpt.
"""

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from cifar_lightning.checkpoints.checksum import add_checksum
from cifar_lightning.checkpoints.loading import UnreadableError, read_checkpoint
from cifar_lightning.errors import RunError, UserError
from cifar_lightning.files import make_folder, write_bytes_durably
from cifar_lightning.runs.folder import RunFolder


class DurableCheckpointIO(CheckpointIO):
    """How the Trainer writes and reads checkpoints: durably, has_sum, as data alone."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint whole or not at all. What was last.ckpt is previous.ckpt then.

        Raises:
            RunError: It cannot be written, or its weights are not finite; what lay there before is intact.
        """
        target = Path(path)
        broken = next((name for name, value in checkpoint["state_dict"].items() if not _is_finite(value)), None)
        if broken is not None:
            raise RunError(
                f"{target}: not written, since {broken} holds NaN or infinity after step {checkpoint['global_step']}"
                f"{_kept(target)[0]}.\nLower --lr, or clip with --trainer.gradient_clip_val 1."
            )
        buffer = BytesIO()
        torch.save(checkpoint, buffer)
        try:
            make_folder(target.parent)
            run = RunFolder(target.parent.parent)
            keep_as = run.previous_checkpoint if target == run.last_checkpoint else None
            write_bytes_durably(target, add_checksum(buffer.getvalue()), keep_as=keep_as)
        except OSError as error:
            kept, then = _kept(target)
            raise RunError(
                f"{target}: cannot be written ({error.strerror}){kept}.\nMake room or mend the permissions{then}"
            ) from error

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU, checked; see `read_checkpoint`."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint that the Trainer no longer keeps."""
        Path(path).unlink(missing_ok=True)


def _kept(target: Path) -> tuple[str, str]:
    """Return what is left where a checkpoint could not be written, and how to go on from it, as ends of sentences."""
    run = RunFolder(target.parent.parent)
    if target.parent == run.checkpoints and run.resumed_checkpoint.exists():
        return "; the checkpoint before is kept", f", then: {run.resume_command}"
    return ("; what lay there before is kept" if target.exists() else ""), "."


def _is_finite(value: Any) -> bool:
    return not (isinstance(value, Tensor) and value.is_floating_point()) or bool(value.isfinite().all())


def newest_checkpoint(run: RunFolder) -> tuple[Path, dict[str, Any], list[tuple[Path, str]]]:
    """Read the newest undamaged checkpoint of a run: the last, the one before, or the best.

    Returns:
        Its path, what it holds, and what is wrong with each newer one: damaged, or the last one missing.

    Raises:
        UserError: There is none, or the newest cannot be read now.
    """
    damages: list[tuple[Path, str]] = []
    for path in run.resumed_checkpoints:
        if not path.exists():
            continue
        try:
            found = read_checkpoint(path)
        except UnreadableError:  # it may be whole: an older one must not take its place
            raise
        except UserError as error:
            damages.append((path, str(error)))
        else:
            if not run.last_checkpoint.exists():
                damages.insert(0, (run.last_checkpoint, f"{run.last_checkpoint} is missing."))
            return path, found, damages
    if not damages:
        run.require(run.last_checkpoint)
    raise UserError(f"{damages[0][1]}\nNo other checkpoint in {run.checkpoints} can be read: train again.")
