"""BestCheckpoint: saves best.ckpt at the best val/acc."""

import math
from pathlib import Path
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
        self._state_key = super().state_key
        self._best_loss = math.inf

    @property
    def state_key(self) -> str:
        """Key in a checkpoint, formatted once: Lightning reads it seven times a step."""
        return self._state_key

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Whether this epoch is the best so far, by the metrics of all processes."""
        if current is None:
            return False
        loss, best = float(trainer.callback_metrics["val/loss"]), self.best_model_score
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
        """Return Lightning's state and the loss of the best epoch."""
        return super().state_dict() | {"best_loss": self._best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the best score also after the folder was moved, if best.ckpt moved with it.

        Lightning forgets the score of another path, so that a worse epoch would overwrite the best.
        """
        own = f"{self.dirpath}/{self.filename}{self.FILE_EXTENSION}"
        if state_dict.get("best_model_path") and Path(own).is_file():
            score = state_dict.get("best_model_score")
            paths = ("best_model_path", "kth_best_model_path", "last_model_path")
            moved: dict[str, Any] = {name: own for name in paths if state_dict.get(name)}
            moved["dirpath"] = str(self.dirpath)
            state_dict = {**state_dict, **moved, "best_k_models": {} if score is None else {own: score}}
        super().load_state_dict(state_dict)
        self.current_score = state_dict.get("current_score")  # which Lightning saves and does not load
        self._best_loss = state_dict.get("best_loss", math.inf)  # absent in Lightning's own state
