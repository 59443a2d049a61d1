"""BestCheckpoint: saves best.ckpt at the best val/acc."""

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.ending import is_cut
from cifar_lightning.training.run_recorder import MONITOR


class BestCheckpoint(ModelCheckpoint):
    """Saves best.ckpt at the best val/acc, among equal ones at the lowest val/loss.

    A small validation split has few distinct accuracies, so that many epochs tie for the best.

    Args:
        run: The run's folder.
    """

    def __init__(self, run: RunFolder) -> None:
        super().__init__(
            dirpath=run.checkpoints,
            filename=run.best_checkpoint.stem,
            monitor=MONITOR,
            mode="max",
            enable_version_counter=False,
        )
        self._run = run
        self._best_loss = math.inf

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Consider each validation where a number of batches is between two; Lightning takes 1 for 1.0, an epoch."""
        super().setup(trainer, pl_module, stage)
        if isinstance(getattr(trainer, "val_check_interval", None), int):  # which Lightning does not set for a duration
            self._save_on_train_epoch_end = False

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Whether this epoch is the best so far, by the metrics of all processes."""
        if current is None:
            return False
        loss, best = float(trainer.callback_metrics.get("val/loss", math.nan)), self.best_model_score
        is_better = super().check_monitor_top_k(trainer, current)
        is_better = is_better or (best is not None and bool(current == best) and loss < self._best_loss)
        if is_better:
            self._best_loss = math.inf if math.isnan(loss) else loss
        return is_better

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save at the end of an epoch, unless a limit cut it: its validation did not run."""
        if not is_cut(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return Lightning's state, with paths relative to the run, and the loss of the best epoch."""
        state = self._with_paths(super().state_dict(), self._run.checkpoints.name)
        return state | {"best_loss": self._best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the best score if best.ckpt is there, wherever the folder was when the checkpoint was written."""
        if state_dict.get("best_model_path") and not self._run.best_checkpoint.is_file():
            return
        super().load_state_dict(self._with_paths(state_dict, str(self.dirpath)))
        self.current_score = state_dict.get("current_score")  # which Lightning saves and does not load
        self._best_loss = state_dict.get("best_loss", math.inf)  # absent in Lightning's own state

    def _with_paths(self, state: dict[str, Any], folder: str) -> dict[str, Any]:
        """Return a state with all paths in another folder: Lightning forgets the score of another path."""
        own, score = f"{folder}/{self._run.best_checkpoint.name}", state.get("best_model_score")
        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        moved: dict[str, Any] = {name: own for name in paths if state.get(name)}
        return {**state, **moved, "dirpath": folder, "best_k_models": {} if score is None else {own: score}}
