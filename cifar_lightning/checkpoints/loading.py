"""Trained weights from files: a run's network with what it needs to look at new images; imports no Lightning.

A checkpoint holds plain types only and is read with `weights_only=True`: it cannot run code.
"""

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cifar_lightning.checkpoints.checksum import has_checksum, is_intact
from cifar_lightning.checkpoints.schema import upgrade_checkpoint
from cifar_lightning.errors import UserError
from cifar_lightning.models.state_dicts import describe_misfits, has_other_classes, without_wrappers

_MODEL = "model."  # what ImageClassifier calls it, and torch.compile's wrapper does not change
# How torch.save began a file before version 1.6. Most of torchvision's published weights are such files.
_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_DATA = "ImageDataModule"  # the key under which Lightning keeps the data module's state
RESUME_STATE = "cifar_lightning"
"""The key under which a run's checkpoint keeps what an exact resume needs beside Lightning's state: see `exact`."""


class UnreadableError(UserError):
    """Raised where the system cannot read a file now, which says nothing against the file: it may be whole."""


def progress_of(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """Return the epochs that a checkpoint's run has finished, and the optimiser steps up to the end of the last one."""
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if loop is None:
        return 0, 0
    epochs, steps = loop["epoch_progress"]["current"], int(checkpoint["global_step"])
    if epochs["ready"] > epochs["processed"]:  # saved inside an epoch, or before its end was counted
        steps -= loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["current"]["completed"]
    return int(epochs["processed"]), steps


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, as data, after its hash was found right.

    A file that no run here wrote has no hash; of it the zip format's own checksums must be right. The format that torch
    wrote before 1.6 has none of either.

    Raises:
        UnreadableError: The disk, the permissions or too little memory are in the way.
        UserError: It is missing, damaged, or holds more than plain types and tensors.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give a checkpoint, such as RUN/checkpoints/best.ckpt.") from error
    except (OSError, MemoryError) as error:
        raise _unreadable(path, error) from error
    try:
        has_sum = has_checksum(data)
        if has_sum and not is_intact(data):
            raise zipfile.BadZipFile("its SHA-256 is wrong")
        if not has_sum and not data.startswith(_BEFORE_ZIP):
            _check_zip(data)
        checkpoint = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError as error:
        raise _unreadable(path, error) from error
    except pickle.UnpicklingError as error:
        # torch's message names it: "Unsupported global: GLOBAL torchvision.models.resnet.ResNet was not an allowed".
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f" ({kind[1]})" if kind else ""
        raise UserError(
            f"{path}: refused, since it holds more than numbers{found} and could run code.\n"
            "Of a whole model, save the numbers alone where it was made: torch.save(model.state_dict(), FILE)."
        ) from error
    except Exception as error:  # damaged files make the readers of zip and pickle raise nearly anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if "can't allocate memory" in reason:  # torch's own words for it
            raise _unreadable(path, error) from error
        raise UserError(f"{path}: a damaged checkpoint, or none ({reason}).") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__} and not a checkpoint.")
    if not has_sum and RESUME_STATE in checkpoint:
        raise UserError(f"{path}: a damaged checkpoint (its SHA-256 is cut off or overwritten).")
    return upgrade_checkpoint(checkpoint)


def _unreadable(path: Path, error: Exception) -> UnreadableError:
    reason = error.strerror if isinstance(error, OSError) else "not enough memory"
    return UnreadableError(f"{path}: cannot be read ({reason}); nothing was changed. Mend that and try again.")


def _check_zip(data: bytes) -> None:
    with zipfile.ZipFile(BytesIO(data)) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise pickle.UnpicklingError("TorchScript")
        damaged = archive.testzip()  # torch.load does not look at the checksums
    if damaged:
        raise zipfile.BadZipFile(f"{damaged} has a wrong checksum")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, of a plain `state_dict` file or of a .safetensors file, by name.

    Raises:
        UserError: It cannot be read as one of these.
    """
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise UserError(f"{path}: reading it needs safetensors: pip install 'cifar-lightning[export]'") from error
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read as safetensors ({error}).") from error
    return weights_of(read_checkpoint(path), path)


def weights_of(checkpoint: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Return a checkpoint's tensors under the network's own names.

    Raises:
        UserError: There are none.
    """
    state = checkpoint.get("state_dict", checkpoint)
    if any(name.startswith(_MODEL) for name in state):
        state = {name.removeprefix(_MODEL): tensor for name, tensor in state.items() if name.startswith(_MODEL)}
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no weights.")
    return tensors


def load_weights(model: nn.Module, path: Path, checkpoint: dict[str, Any] | None = None) -> None:
    """Put the weights of a file into a network.

    Args:
        model: Gets them.
        path: The file; see `read_weights`.
        checkpoint: What the file holds, where it has been read already.

    Raises:
        UserError: Names the first tensors that do not fit; the network is then untouched.
    """
    ours = model.state_dict()
    theirs = without_wrappers(read_weights(path) if checkpoint is None else weights_of(checkpoint, path), ours)
    misfits = describe_misfits(theirs, ours)
    if misfits and has_other_classes(theirs, ours):
        raise UserError(
            f"{path}: of other classes or images: {misfits}.\n"
            f"To begin with all of it but the last layer: --model.pretrained {path}"
        )
    if misfits:
        raise UserError(
            f"{path}: of another network: {misfits}.\nGive the --model and --data flags that it was trained with."
        )
    model.load_state_dict(theirs)


def statistics_of(checkpoint: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and std per channel, of images scaled to 0-1, that a run's checkpoint was trained with, or None."""
    data = checkpoint.get(_DATA) or {}
    return (tuple(data["mean"]), tuple(data["std"])) if {"mean", "std"} <= data.keys() else None


def plain(value: Any) -> Any:
    """Return a value as types that load with `weights_only=True`; what has no such form becomes its description."""
    if isinstance(value, np.generic | np.ndarray):  # first: np.float64 is a float, too
        return value.tolist()
    if value is None or isinstance(value, str | bool | int | float | Tensor | torch.dtype):
        return value
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if isinstance(value, list | set | frozenset):
        return list(map(plain, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else repr(value)
