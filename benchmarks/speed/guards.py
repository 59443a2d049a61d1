"""Cost of safety: host time per step of the guards, and milliseconds of a durable checkpoint.

    python -m benchmarks.speed.guards            5 rounds
    python -m benchmarks.speed.guards --json benchmarks/results/guards.json

`fit` of a one-layer model runs in turn with and without the callbacks that act in each step: NanGuard, and
LastCheckpoint, which checks signals and schedules. Then the Trainer saves SmallNet's state (14 MB with AdamW's moments)
in turn by our checkpoint plugin, which hashes, syncs and renames, and by Lightning's own, which does none of these.
Everything runs in one process on the CPU, where each loss is read; on a GPU and with several processes NanGuard works
in another way, which is not measured. The last line is the step time with the guards over the step time without.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
import timeit
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO

from benchmarks.hardware import results_file
from benchmarks.speed.one_layer import SMALL_BATCH, one_layer, silence, step_us
from benchmarks.speed.overhead import default_training, our_fit, register
from benchmarks.speed.results import spread, write_results
from cifar_lightning import ImageClassifier, ImageDataModule
from cifar_lightning.checkpoints.durable import DurableCheckpointIO
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.last_checkpoint import CheckpointSchedule, LastCheckpoint
from cifar_lightning.training.nan_guard import NanGuard
from cifar_lightning.training.signals import StopSignals

NUM_SAVES = 20


@contextlib.contextmanager
def without_guards() -> Iterator[None]:
    """Remove the callbacks that act in each step."""
    with (
        mock.patch.object(NanGuard, "on_before_backward", pl.Callback.on_before_backward),
        mock.patch.object(LastCheckpoint, "on_train_batch_end", pl.Callback.on_train_batch_end),
    ):
        yield


def step_costs(rounds: int) -> tuple[list[float], list[float]]:
    """Return microseconds a step with and without the guards, round by round; who goes first alternates."""
    guarded, bare = list[float](), list[float]()
    fit = partial(our_fit, default_training(), "one_layer", SMALL_BATCH)
    for number in range(rounds):
        for is_guarded in (True, False) if number % 2 == 0 else (False, True):
            with contextlib.nullcontext() if is_guarded else without_guards():
                (guarded if is_guarded else bare).append(step_us(fit))
    return guarded, bare


def call_cost_us() -> float:
    """Return the least microseconds of one step's calls alone: robust on a machine where other programs run."""
    with silence(), tempfile.TemporaryDirectory() as folder:
        trainer = trained(DurableCheckpointIO())
        guard = NanGuard()
        last = LastCheckpoint(RunFolder(Path(folder)), CheckpointSchedule(every_n_train_steps=1000), StopSignals())
        loss = torch.tensor(1.0, requires_grad=True) * 2

        def step() -> None:
            guard.watch(loss, trainer.global_step, trainer.current_epoch)
            last.on_train_batch_end(trainer)

        return 1e6 * min(timeit.repeat(step, number=1000, repeat=50)) / 1000


def trained(plugin: CheckpointIO) -> pl.Trainer:
    """Return a Trainer that has made one step of SmallNet and saves by a plugin."""
    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, plugins=[plugin], **settings)
    trainer.fit(ImageClassifier(), ImageDataModule("synthetic"))
    return trainer


def save_costs(folder: Path) -> tuple[list[float], list[float], int]:
    """Return milliseconds of each save by our plugin and by Lightning's, in turn, and a checkpoint's bytes."""
    costs: dict[str, list[float]] = {"ours": [], "lightning": []}
    with silence():
        trainers = {"ours": trained(DurableCheckpointIO()), "lightning": trained(TorchCheckpointIO())}
    for _ in range(NUM_SAVES):
        for name, trainer in trainers.items():
            began = time.perf_counter()
            trainer.save_checkpoint(folder / f"{name}.ckpt")
            costs[name].append(1e3 * (time.perf_counter() - began))
    return costs["ours"], costs["lightning"], (folder / "ours.ckpt").stat().st_size


def main() -> None:
    """Measure and print; the last line is `ratio=X`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of both ways (default 5)")
    parser.add_argument("--json", type=results_file, help="write all results to this file")
    args = parser.parse_args()
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # before: did other programs run?
    register(one_layer=one_layer)
    guarded, bare = step_costs(args.rounds)
    added = [one - other for one, other in zip(guarded, bare, strict=True)]
    print(f"one-layer model, batch {SMALL_BATCH}, {args.rounds} rounds of 1,125 steps, microseconds a step, CPU:")
    print(f"  with the guards {spread(guarded)}, without {spread(bare)}, added {spread(added)}")
    call_us = call_cost_us()
    print(f"  the calls alone: {call_us:.1f} (the least of 50 times 1,000)")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # a disk and not a file system in memory
        ours, lightning, num_bytes = save_costs(Path(folder))
    print(f"checkpoint of SmallNet with AdamW, {num_bytes / 1e6:.1f} MB, {NUM_SAVES} saves, milliseconds, synced:")
    print(f"  ours {spread(ours)}, Lightning's, not synced, {spread(lightning)}")
    write_results(
        args.json,
        device="cpu",
        num_processes=1,
        load_average=load_average,
        torch=torch.__version__,
        guarded_us=guarded,
        bare_us=bare,
        added_us=added,
        call_us=call_us,
        num_saves=NUM_SAVES,
        save_ms=ours,
        lightning_save_ms=lightning,
        checkpoint_bytes=num_bytes,
    )
    ratios = [one / other for one, other in zip(guarded, bare, strict=True)]
    print(f"host time of a step with the guards over without, {args.rounds} rounds, CPU: {spread(ratios, 3)}")
    print(f"ratio={statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
