"""Run a Python program and inject faults at exact moments, from inside its process.

    python -m benchmarks.faults.sabotage SIGKILL@train:47 train.py fit --epochs 3
    python -m benchmarks.faults.sabotage nan@batch:22,note@train:0 train.py fit --epochs 3

An act is `WHAT@WHERE:N`, N counted from 0 in this process; several are separated by commas. WHERE is

    batch, train, val           before a training batch; inside one, before its backward pass; before a validation batch
    epoch                       the start of a training epoch
    write                       in the middle of the bytes of a checkpoint: the kernel ends the process there
    fsync, replace, replaced    before a checkpoint is flushed; before and after it is renamed
    file                        before another file of a run is renamed
    start                       before the program runs

WHAT is a signal's name, `group-` and a signal's name for the whole process group, or one of `ACTS`.
"""

import dataclasses
import io
import json
import os
import resource
import runpy
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOTES = "FAULT_NOTES"  # environment variable: the folder for notes
ARCHIVE = "FAULT_ARCHIVE"  # environment variable: JSON of what stands in for CIFAR-10's archive
_JUMP_S = 400 * 86_400  # further than any rotation, lease or certificate reaches

_acts: dict[tuple[str, int], list[str]] = {}
_counts: dict[str, int] = {}
_pending: set[str] = set()  # what the next loss is made into


def reach(where: str) -> None:
    """Count a moment and perform its acts."""
    number = _counts.get(where, 0)
    _counts[where] = number + 1
    for what in _acts.get((where, number), ()):
        do(what)


def do(what: str) -> None:
    """Perform one act."""
    if what in ACTS:
        ACTS[what]()
    elif what.startswith("group-"):
        os.killpg(os.getpgrp(), getattr(signal, what.removeprefix("group-")))
    else:
        os.kill(os.getpid(), getattr(signal, what))


# -- acts ----------------------------------------------------------------------------------------------------------


def note() -> None:
    """Write the number of training epochs that this process has begun to a file."""
    rank = os.environ.get("LOCAL_RANK", "0")
    Path(os.environ[NOTES], f"rank{rank}").write_text(str(_counts.get("epoch", 0)), encoding="utf-8")


def note_updates() -> None:
    """Create a file at the next optimizer step."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def updated(*_: Any) -> None:
        Path(os.environ[NOTES], "updated").touch()

    register_optimizer_step_post_hook(updated)


def without_rng() -> None:
    """Resume without restoring random states."""
    from cifar_lightning.checkpoints import rng_state

    rng_state.restore_rng = lambda *_: None


def clock(seconds: float) -> Callable[[], None]:
    """Return an act that sets the program's clock."""

    def jump() -> None:
        real = time.time
        time.time = lambda: real() + seconds

    return jump


def small_archive() -> None:
    """Replace CIFAR-10's archive by a small one."""
    from cifar_lightning.data import download

    known = json.loads(os.environ[ARCHIVE])
    known["urls"] = tuple(known["urls"])
    download.TIMEOUT_S = 3.0  # of silence, and of a measurement of the speed: the row waits for both
    download.ARCHIVES["cifar10"] = dataclasses.replace(download.ARCHIVES["cifar10"], **known)


def out_of_memory() -> None:
    """Take the GPU's memory away, so that the next allocation fails; without a GPU, raise what torch would raise."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e-6)
    else:
        _pending.add("oom")


def time_up() -> None:
    """Set the clock of Lightning's Timer ahead."""
    from lightning.pytorch.callbacks import timer

    timer.time = types.SimpleNamespace(monotonic=lambda: time.monotonic() + _JUMP_S)


ACTS: dict[str, Callable[[], None]] = {
    "note": note,
    "note-updates": note_updates,
    "no-rng": without_rng,
    "clock-back": clock(-_JUMP_S),
    "clock-ahead": clock(_JUMP_S),
    "archive": small_archive,
    "oom": out_of_memory,
    "time-up": time_up,
    "nan": lambda: _pending.add("nan"),
}


# -- moments -------------------------------------------------------------------------------------------------------


def watch_training() -> None:
    """Add a callback to every Trainer and wrap the loss."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.trainer.connectors.callback_connector import _CallbackConnector
    from torch.nn import functional

    class Moments(pl.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            reach("epoch")

        def on_train_batch_start(self, *_: Any) -> None:
            reach("batch")

        def on_before_backward(self, *_: Any) -> None:
            reach("train")

        def on_validation_batch_start(self, *_: Any) -> None:
            reach("val")

    add, cross_entropy = _CallbackConnector.on_trainer_init, functional.cross_entropy

    def add_watched(self: _CallbackConnector, callbacks: Any, *args: Any, **kwargs: Any) -> None:
        asked = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
        add(self, [*asked, Moments()], *args, **kwargs)

    def spoiled(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "oom" in _pending:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")
        return cross_entropy(*args, **kwargs) * (float("nan") if "nan" in _pending else 1)

    # Not Trainer.__init__: LightningCLI reads its signature and its source.
    _CallbackConnector.on_trainer_init, functional.cross_entropy = add_watched, spoiled


def watch_files() -> None:
    """Wrap the functions that write checkpoints."""
    import torch

    save, fsync = torch.save, os.fsync

    def save_watched(obj: object, file: Any, *args: Any, **kwargs: Any) -> None:
        size = io.BytesIO()
        save(obj, size)
        if _is_due("write"):
            _end_inside_the_next(len(size.getvalue()))
        save(obj, file, *args, **kwargs)

    def fsync_watched(fd: Any) -> None:
        if ".ckpt" in os.readlink(f"/proc/self/fd/{fd if isinstance(fd, int) else fd.fileno()}"):
            reach("fsync")
        fsync(fd)

    def watched(rename: Callable) -> Callable:
        def moved(source: Any, target: Any, **kwargs: Any) -> None:
            if not os.fspath(target).endswith(".ckpt"):
                reach("file")
                return rename(source, target, **kwargs)
            reach("replace")
            is_killed = _is_due("replaced")
            if is_killed:  # where it is not one act, across file systems, the copy that follows is ended in its middle
                _end_inside_the_next(os.path.getsize(source))
            rename(source, target, **kwargs)
            if is_killed:
                os.kill(os.getpid(), signal.SIGKILL)
            return None

        return moved

    torch.save, os.fsync, os.replace, os.rename = save_watched, fsync_watched, watched(os.replace), watched(os.rename)


def _is_due(where: str) -> bool:
    """Count a moment at which the kernel has to act; return whether this is the one that was chosen."""
    number = _counts.get(where, 0)
    _counts[where] = number + 1
    return (where, number) in _acts


def _end_inside_the_next(size_bytes: int) -> None:
    """Have the kernel end this process, as SIGKILL would, when a file grows beyond half of a size."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes // 2, size_bytes // 2))


def sabotage_the_children_too() -> None:
    """Have Lightning start the processes of further ranks by the same command."""
    from lightning.pytorch.strategies.launchers import subprocess_script

    subprocess_script._basic_subprocess_cmd = lambda: [sys.executable, *sys.orig_argv[1:]]


def main() -> None:
    """Prepare, and run the program in this process."""
    command = sys.argv
    for act in command[1].split(","):
        what, _, moment = act.partition("@")
        where, _, number = moment.partition(":")
        _acts.setdefault((where, int(number or 0)), []).append(what)
    places = {where for where, _ in _acts}
    if places & {"batch", "train", "val", "epoch"}:
        watch_training()
        sabotage_the_children_too()
    if places & {"write", "fsync", "replace", "replaced", "file"}:
        watch_files()
    sys.argv = command[2:]
    reach("start")
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
