"""What a checkpoint needs beside Lightning's state so that a run goes on bit for bit, for each rank.

Lightning keeps weights, optimiser, schedule, loops, callbacks and the loader's position, but no random state and none
of the sums of an epoch that has not ended. Order and augmentation are functions of seed and epoch and need nothing.
"""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn

from cifar_lightning.checkpoints.loading import EXACT_STATE, progress_of
from cifar_lightning.errors import UserError
from cifar_lightning.training.module import ImageClassifier


class ExactState(pl.Callback):
    """Keeps random states and the epoch's sums of every rank in checkpoints; puts them back when training starts."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Collect the states; every rank takes part."""
        assert isinstance(pl_module, ImageClassifier)
        own = {"rng": rng_state(trainer.strategy.root_device), "epoch_sums": pl_module.totals.state()}
        ranks: list[Any] = [own]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, own)
        checkpoint[EXACT_STATE] = {"ranks": ranks}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep a checkpoint's states until the Trainer is ready; validation and test, which get here too, need none.

        Raises:
            UserError: It was saved inside an epoch by another number of processes, whose batches were others.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._loaded = checkpoint.get(EXACT_STATE)
        if self._loaded is None:
            return
        num_ranks = len(self._loaded["ranks"])
        if is_inside_epoch(checkpoint) and num_ranks != trainer.world_size:
            raise UserError(
                f"--trainer.devices: the checkpoint was saved inside an epoch on {num_ranks} process(es), not on "
                f"{trainer.world_size}.\nGo on with as many, at least to the epoch's end."
            )
        if not is_inside_epoch(checkpoint):
            for rank in self._loaded["ranks"]:
                rank["epoch_sums"] = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the states back, last of all that may draw random numbers before the first batch."""
        assert isinstance(pl_module, ImageClassifier)
        if self._loaded is None:
            return
        ranks, self._loaded = self._loaded["ranks"], None
        if trainer.global_rank >= len(ranks):
            # More processes than before, at an epoch's start: this one goes on with what all were seeded with alike,
            # as in a new run, where every process draws the same dropout masks for pictures of its own.
            return
        own = ranks[trainer.global_rank]
        restore_rng(own["rng"], trainer.strategy.root_device)
        if own["epoch_sums"] is not None:
            pl_module.totals.restore(own["epoch_sums"])


def is_inside_epoch(checkpoint: dict[str, Any]) -> bool:
    """Return whether a checkpoint was saved before the end of an epoch that had begun."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    return bool(progress["ready"] > progress_of(checkpoint)[0])


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of Python's, NumPy's, torch's and the device's generators as plain types and tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `rng_state` returned; the device's only where it is of the same kind."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
