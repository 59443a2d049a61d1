"""The answers of a test: logits of every image from all ranks, and the files of a run that are made of them."""

import io
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from cifar_lightning.data.datasets import Split
from cifar_lightning.data.sampler import Rank
from cifar_lightning.files import write_bytes_durably, write_json
from cifar_lightning.metrics.classification import test_metrics
from cifar_lightning.report.gallery import gallery_positions
from cifar_lightning.report.results import Predictions
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.data_protocol import require_training_data
from cifar_lightning.training.module import Batch


class PredictionWriter(pl.Callback):
    """Keeps the logits of `trainer.test`, `validate` and `predict`, from all ranks, and writes them into the run.

    Args:
        run: The run's folder; None keeps them in `test` alone.
        output: Where `predict` writes instead.

    Attributes:
        test: The answers of the last test.
        is_test_written: Whether the run holds them.
        num_written: Images whose answers `predict` wrote.
        written_to: Where it did.
    """

    def __init__(self, run: RunFolder | None, output: Path | None = None) -> None:
        self.run, self.output = run, output
        self.num_written, self.written_to = 0, Path()
        self.test: Predictions | None = None
        self.is_test_written = False
        self._logits: list[Tensor] = []
        self._targets: list[Tensor] = []

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, *args: Any
    ) -> None:
        """Keep a batch's answers."""
        self._keep(outputs, batch)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, *args: Any
    ) -> None:
        """Keep a batch's answers, but not those of the validations within `fit`."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._keep(outputs, batch)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, *args: Any
    ) -> None:
        """Keep a batch's answers."""
        self._keep(outputs, batch)

    def _keep(self, logits: Tensor, batch: Batch) -> None:
        self._logits.append(logits.float().cpu())
        self._targets.append(batch[1].cpu())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write predictions_val.npz."""
        if trainer.state.fn != TrainerFn.VALIDATING:
            return
        answers = self._gather(trainer, "val")
        if answers is not None and self._is_to_write(trainer, "val", answers):
            assert self.run is not None
            _write_predictions(self.run.predictions_val, answers)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write predictions.npz, or the file that was asked for."""
        answers = self._gather(trainer, "test")
        if answers is None:
            return
        self.written_to = self.output or (self.run.predictions if self.run is not None else Path("predictions.npz"))
        self.num_written = len(answers["targets"])
        _write_predictions(self.written_to, answers)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write predictions.npz, test_metrics.json, the confusion matrix's tensor and the gallery."""
        answers = self._gather(trainer, "test")
        if answers is None:
            return
        data = require_training_data(trainer)
        logits, targets, indices = (answers[name] for name in ("logits", "targets", "indices"))
        self.test = Predictions(logits, targets, indices, data.class_names)
        self.is_test_written = self._is_to_write(trainer, "test", answers)
        if not self.is_test_written:
            return
        assert self.run is not None
        _write_predictions(self.run.predictions, answers)
        metrics = test_metrics(logits, targets, data.class_names)
        if "test/acc_no_tta" in trainer.callback_metrics:
            metrics["accuracy_no_tta"] = trainer.callback_metrics["test/acc_no_tta"].item()
        write_json(self.run.test_metrics, metrics)
        _write_tensor(self.run.confusion_matrix_pt, torch.from_numpy(self.test.confusion))
        shown = indices[gallery_positions(logits, targets)]
        images = data.images("test", shown)
        _write_npz(self.run.gallery, images=images, indices=shown, class_names=answers["class_names"])

    def _is_to_write(self, trainer: pl.Trainer, part: Split, answers: dict[str, np.ndarray]) -> bool:
        num_answers, num_images = len(answers["targets"]), require_training_data(trainer).num_images(part)
        if self.run is not None and num_answers < num_images:
            print(f"Only {num_answers:,} of {num_images:,} {part} images were asked for: no file is written of them.")
        return self.run is not None and num_answers == num_images

    def _gather(self, trainer: pl.Trainer, part: Split) -> dict[str, np.ndarray] | None:
        """Return all ranks' answers in the split's order on rank 0, None elsewhere; every rank must call it."""
        own = (torch.cat(self._logits).numpy(), torch.cat(self._targets).numpy())
        self._logits, self._targets = [], []
        shares = [own]
        if trainer.world_size > 1:
            gathered: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
            torch.distributed.gather_object(own, gathered)
            shares = gathered or []
        if not trainer.is_global_zero:
            return None
        data = require_training_data(trainer)
        positions = [
            data.rank_positions(part, Rank(rank, trainer.world_size))[: len(targets)]
            for rank, (_, targets) in enumerate(shares)
        ]
        order = np.argsort(np.concatenate(positions))
        return {
            "logits": np.concatenate([logits for logits, _ in shares])[order],
            "targets": np.concatenate([targets for _, targets in shares])[order],
            "indices": np.concatenate(positions)[order],
            "class_names": np.array(data.class_names),
        }


def _write_predictions(path: Path, answers: dict[str, np.ndarray]) -> None:
    probs = torch.from_numpy(answers["logits"]).softmax(1).numpy()
    _write_npz(path, **answers, probs=probs)


def _write_npz(path: Path, **arrays: Any) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes_durably(path, buffer.getvalue())


def _write_tensor(path: Path, tensor: Tensor) -> None:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    write_bytes_durably(path, buffer.getvalue())
