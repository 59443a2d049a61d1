"""Reading checkpoints and weights from files. Imports no Lightning.

A checkpoint holds plain types only and is loaded with `weights_only=True`, so that it cannot run code.
"""

import json
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Collection, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cifar_lightning.checkpoints.checksum import has_checksum, is_intact
from cifar_lightning.checkpoints.schema import (
    DATA_STATE,
    LOGGED_METRICS,
    RESUME_STATE,
    TEMPERATURE,
    check_checkpoint,
    upgrade_checkpoint,
    with_data_state,
)
from cifar_lightning.data.memory import free_host_bytes, is_out_of_memory
from cifar_lightning.errors import UserError
from cifar_lightning.files import open_regular, read_bytes
from cifar_lightning.formatting import reason_of, shell_line
from cifar_lightning.models.state_dicts import (
    CONTAINERS,
    describe_misfits,
    find_weights,
    has_other_classes,
    named,
    without_wrappers,
)
from cifar_lightning.runs.folder import RunFolder

_MODEL = "model."  # `ImageClassifier.model`
# First bytes of a file of torch.save before 1.6, as most of torchvision's published weights are.
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
IS_INSIDE_WINDOW = "is_inside_window"
"""Key in `RESUME_STATE` of a checkpoint that was saved while gradients were accumulated, which no checkpoint holds."""


class UnreadableError(UserError):
    """Raised if the system cannot read a file, which itself may be intact."""


def progress_of(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """Return the number of finished epochs of a checkpoint, and of optimizer steps in them."""
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if loop is None:
        return 0, 0
    epochs, steps = loop["epoch_progress"]["current"], int(checkpoint["global_step"])
    if is_inside_epoch(checkpoint):
        steps -= loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["current"]["completed"]
        by_hand = loop.get("epoch_loop.manual_optimization.optim_step_progress", {}).get("total", {}).get("completed")
        if by_hand:  # which Lightning does not count by epochs
            batches = loop["epoch_loop.batch_progress"]
            steps -= round(by_hand * batches["current"]["processed"] / max(1, batches["total"]["processed"]))
    return int(epochs["processed"]), steps


def is_inside_epoch(checkpoint: dict[str, Any]) -> bool:
    """Return whether a checkpoint was saved inside an epoch, or before its end was counted."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    return bool(progress["ready"] > progress["processed"])


def require_resumable(checkpoint: dict[str, Any], path: Path) -> None:
    """Raise if a checkpoint was saved inside an accumulation window, from which no exact resume is possible."""
    if checkpoint.get(RESUME_STATE, {}).get(IS_INSIDE_WINDOW):
        raise UserError(
            f"{path}: saved inside an accumulation window, whose gradients are lost; an exact resume is not possible.\n"
            f"Start a new run: fit --init_weights {shell_line(path)}"
        )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Verify a checkpoint's checksum and load it onto the CPU, upgraded to the current schema.

    Files of other programs have no checksum; of these the checksums of the zip format are verified. The format of torch
    before 1.6 has neither.

    Raises:
        UnreadableError: The disk, permissions or memory prevent reading it.
        UserError: It is missing, damaged, or holds more than plain types and tensors.
    """
    try:
        most = int(free_host_bytes()) if sys.platform == "linux" else sys.maxsize  # elsewhere it is not known
        data = read_bytes(path, most, follow_links=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give a checkpoint such as RUN/checkpoints/best.ckpt.") from error
    except (OSError, MemoryError) as error:
        raise _unreadable(path, error) from error
    try:
        has_sum = has_checksum(data)
        if has_sum and not is_intact(data):
            raise zipfile.BadZipFile("its SHA-256 is wrong")
        if not has_sum and not data.startswith(_LEGACY_MAGIC):
            _check_zip(data)
        checkpoint = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError as error:
        raise _unreadable(path, error) from error
    except pickle.UnpicklingError as error:
        # torch's message: "Unsupported global: GLOBAL torchvision.models.resnet.ResNet was not an allowed".
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        name = f" ({kind[1]})" if kind else ""
        raise UserError(
            f"{path}: refused, as it holds more than tensors{name} and could run code.\n"
            "Save only the tensors of a whole model: torch.save(model.state_dict(), FILE)."
        ) from error
    except Exception as error:  # on damaged files zip and pickle raise nearly anything
        if is_out_of_memory(error):
            raise _unreadable(path, error) from error
        raise UserError(
            f"{path}: a damaged checkpoint, or not a checkpoint ({reason_of(error)}).{_instead_of(path)}"
        ) from error
    if not isinstance(checkpoint, dict) or not all(isinstance(key, str) for key in checkpoint):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__} and not a checkpoint, a dict of names.")
    if not has_sum and RESUME_STATE in checkpoint:
        raise UserError(f"{path}: a damaged checkpoint (its SHA-256 is missing).{_instead_of(path)}")
    checkpoint = with_data_state(upgrade_checkpoint(checkpoint))
    check_checkpoint(path, checkpoint)
    _forget_old_reasons(checkpoint)
    return checkpoint


def _forget_old_reasons(checkpoint: dict[str, Any]) -> None:
    """Forget why early stopping has ended a run: before `LOGGED_METRICS` a resume after it kept the reason."""
    if RESUME_STATE in checkpoint and LOGGED_METRICS not in checkpoint[RESUME_STATE]:
        for state in checkpoint.get("callbacks", {}).values():
            if isinstance(state, dict) and "stopping_reason" in state:
                state["stopping_reason"] = 0


def _instead_of(path: Path) -> str:
    """Return the way out where a run's best checkpoint is damaged: without it, its last one is tested."""
    run = RunFolder(path.parent.parent)
    if path != run.best_checkpoint or not run.last_checkpoint.exists():
        return ""
    return f"\nMove it away: then {run.last_checkpoint} takes its place."


def _unreadable(path: Path, error: Exception) -> UnreadableError:
    reason = error.strerror if isinstance(error, OSError) else "not enough memory"
    return UnreadableError(f"{path}: cannot be read ({reason}); nothing was changed. Fix this and try again.")


def _check_zip(data: bytes) -> None:
    with zipfile.ZipFile(BytesIO(data)) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise pickle.UnpicklingError("TorchScript")
        damaged = archive.testzip()  # torch.load does not look at the checksums
    if damaged:
        raise zipfile.BadZipFile(f"{damaged} has a wrong checksum")


def read_weights(path: Path, ours: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the tensors by name of a checkpoint, a saved state_dict or a .safetensors file, as `weights_of`."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    return weights_of(read_checkpoint(path), path, ours)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors by name of a .safetensors file, and its metadata.

    Raises:
        UserError: It cannot be read, or is none.
    """
    try:
        # `open_regular` first, as safe_open would wait for a FIFO.
        with open_regular(path, follow_links=True), safe_open(path, framework="pt") as file:
            names = file.keys()  # safe_open has no iteration
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}).") from error


def read_export(path: Path) -> dict[str, Any]:
    """Return what `export` wrote into a .safetensors file as the checkpoint of a run, with all that prediction needs.

    Raises:
        UserError: It cannot be read, or its metadata are not those of an export.
    """
    tensors, about = read_safetensors(path)
    try:
        architecture = json.loads(about["architecture"])
        data = {key: json.loads(about[key]) for key in ("class_names", "image_size", "mean", "std")}
        keys = ("name", "num_classes", "image_size", "in_channels")
        name, _, image_size, _ = (architecture.pop(key, None) for key in keys)
        if image_size not in (None, data["image_size"]):  # the weights may fit and predict otherwise
            raise ValueError(f"image_size {data['image_size']}, of its architecture {image_size}")
        checkpoint = {
            "state_dict": tensors,
            "epoch": int(about["epoch"]) - 1,
            "hyper_parameters": {"name": name, "model_kwargs": architecture}
            | {key: about[key] for key in ("tta", "memory_format")},
            DATA_STATE: data | {"resize": about["resize"]},
            TEMPERATURE: json.loads(about.get(TEMPERATURE, "null")),
        }
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        wrong = f"no {error.args[0]}" if isinstance(error, KeyError) else reason_of(error)
        raise UserError(
            f"{path}: its metadata are not those of an export ({wrong}).\n"
            "Write it again from the run: export RUN --format safetensors --force"
        ) from error
    check_checkpoint(path, checkpoint)
    return checkpoint


def weights_of(checkpoint: dict[str, Any], path: Path, ours: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by their names in the model.

    `ours` are the model's own names: the checkpoint's stay as they are where more of them are in it so than without
    the prefix of `ImageClassifier.model`, since a model may have a `model` inside.
    """
    tensors = find_weights(checkpoint)
    inner = {name.removeprefix(_MODEL): tensor for name, tensor in tensors.items() if name.startswith(_MODEL)}
    if inner and len(inner.keys() & {*ours}) >= len(tensors.keys() & {*ours}):
        tensors = inner
    if not tensors:
        raise UserError(
            f"{path}: holds no weights; it has {named(checkpoint, 8)}.\n"
            f"Expected: tensors by name, alone or under {', '.join(CONTAINERS[:4])}."
        )
    return tensors


def load_weights(model: nn.Module, path: Path, checkpoint: dict[str, Any] | None = None) -> None:
    """Load the weights of a file into a model.

    `checkpoint` is the content of the file, if it was read before.

    Raises:
        UserError: A tensor does not fit; the model is unchanged.
    """
    ours = model.state_dict()
    theirs = read_weights(path, ours) if checkpoint is None else weights_of(checkpoint, path, ours)
    theirs = without_wrappers(theirs, ours)
    misfits = describe_misfits(theirs, ours)
    if misfits and has_other_classes(theirs, ours):
        raise UserError(
            f"{path}: weights for other classes or another image size: {misfits}.\n"
            f"To load all layers but the head: --model.pretrained {path}"
        )
    if misfits and {name: x.shape for name, x in theirs.items()} == {name: x.shape for name, x in ours.items()}:
        raise UserError(f"{path}: {misfits}.\nSave its weights as dense tensors of real numbers.")
    if misfits:
        raise UserError(f"{path}: weights of another model: {misfits}.\nGive the --model and --data flags of its run.")
    model.load_state_dict(theirs)


def statistics_of(checkpoint: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and std per channel (of images scaled to 0-1) of a run's training images; None if not a run."""
    data = checkpoint.get(DATA_STATE)
    return None if data is None else (tuple(map(float, data["mean"])), tuple(map(float, data["std"])))


def plain(value: Any) -> Any:
    """Return a value as types that load with `weights_only=True`; other objects become their `repr`."""
    if isinstance(value, np.generic | np.ndarray):  # first, as np.float64 is also a float
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
