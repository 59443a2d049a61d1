"""PredictionWriter: collects the logits of an evaluation from all ranks and writes the run's files of them."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from cifar_lightning.data.image_set import Split
from cifar_lightning.data.sampler import Rank
from cifar_lightning.errors import UserError
from cifar_lightning.files import in_place_of, write_bytes_durably, write_json, write_text_durably
from cifar_lightning.formatting import index_name, plural
from cifar_lightning.metrics.classification import test_metrics
from cifar_lightning.report.findings import find
from cifar_lightning.report.gallery import gallery_positions
from cifar_lightning.report.prediction_tables import prediction_tables
from cifar_lightning.report.report import make_report
from cifar_lightning.report.results import Predictions, Results
from cifar_lightning.report.terminal import print_findings
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.explanations import explain_mistakes
from cifar_lightning.training.model_checks import is_labelled
from cifar_lightning.training.module import Batch
from cifar_lightning.training.trainer_data import training_data


class PredictionWriter(pl.Callback):
    """Collects the logits of `trainer.test`, `validate` and `predict` and writes them into the run.

    Args:
        run: The run's folder; None writes nothing.
        output: The file that `predict` writes instead of predictions.npz; a .csv gets the rows of predictions.csv.
        class_names: Names of the classes where the Trainer has no `ImageDataModule`; by default their numbers.
    """

    def __init__(
        self, run: RunFolder | None, output: Path | None = None, class_names: Sequence[str] | None = None
    ) -> None:
        self.run, self.output, self.class_names = run, output, class_names
        self.num_written, self.written_to = 0, Path()
        self.test: Predictions | None = None
        self.is_test_written = False
        self._tested_epoch: int | None = None
        self._logits: list[Tensor] = []
        self._targets: list[Tensor] = []

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the epoch of the weights, counted from 1, of a checkpoint that is tested."""
        self._tested_epoch = int(checkpoint["epoch"]) + 1 if trainer.state.fn == TrainerFn.TESTING else None

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, *args: Any
    ) -> None:
        self._logits.append(logits_of(pl_module, outputs, batch).float().cpu())
        self._targets.append(batch[1].cpu())

    def on_predict_batch_end(self, *args: Any) -> None:
        self.on_test_batch_end(*args)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, *args: Any
    ) -> None:
        """Collect the batches of `trainer.validate`, not of the validations within `fit`."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.on_test_batch_end(trainer, pl_module, outputs, batch)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write predictions_val.npz."""
        if trainer.state.fn != TrainerFn.VALIDATING:
            return
        arrays = self._gather(trainer, "val")
        if arrays is not None and self._is_complete(trainer, "val", arrays):
            assert self.run is not None
            _write_predictions(self.run.predictions_val, arrays)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write predictions.npz, or `output`, which may also hold a part of the split."""
        arrays = self._gather(trainer, "test")
        if arrays is None:
            return
        if self.run is not None and self.output is None and not self._is_complete(trainer, "test", arrays):
            return
        self.written_to = self.output or (self.run.predictions if self.run is not None else Path("predictions.npz"))
        self.num_written = len(arrays["targets"])
        if self.written_to.suffix.lower() == ".csv":
            write_text_durably(self.written_to, prediction_tables({"test": _predictions_of(arrays)})[0])
        else:
            _write_predictions(self.written_to, arrays)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Forget the batches of an evaluation that was cut."""
        self._logits, self._targets, self._tested_epoch = [], [], None

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write predictions.npz, test_metrics.json, confusion_matrix.pt, gallery.npz and explanations.npz."""
        arrays = self._gather(trainer, "test")
        tested_epoch, self._tested_epoch = self._tested_epoch, None
        if arrays is None:
            return
        data, self.test = training_data(trainer), _predictions_of(arrays)
        logits, targets, indices = self.test.logits, self.test.targets, self.test.indices
        self.is_test_written = self._is_complete(trainer, "test", arrays)
        if not self.is_test_written:
            return
        assert self.run is not None
        _write_predictions(self.run.predictions, arrays)
        metrics = test_metrics(logits, targets, self.test.class_names)
        if "test/acc_no_tta" in trainer.callback_metrics:
            metrics["accuracy_no_tta"] = trainer.callback_metrics["test/acc_no_tta"].item()
        own = getattr(pl_module, "own_metrics", None) or ()
        metrics |= {name: trainer.callback_metrics[f"test/{name}"].item() for name in own}
        if tested_epoch is not None:
            metrics["epoch"] = tested_epoch
        write_json(self.run.test_metrics, metrics)
        torch.save(torch.from_numpy(self.test.confusion), buffer := io.BytesIO())
        write_bytes_durably(self.run.confusion_matrix_pt, buffer.getvalue())
        if data is not None:
            shown = indices[gallery_positions(logits, targets)]
            images = data.images("test", shown)
            _write_npz(self.run.gallery, images=images, indices=shown, class_names=arrays["class_names"])
        _write_npz(self.run.explanations, **explain_mistakes(trainer, pl_module, self.test))

    def report(self) -> None:
        """Write the run's report of the last test, or print its findings where no run holds the predictions."""
        if self.test is None:  # on every rank but the first
            return
        if self.is_test_written and self.run is not None:
            make_report(self.run, is_short=True)
        else:
            print_findings(find(Results(self.test.class_names, self.test.confusion, test=self.test)))

    def _is_complete(self, trainer: pl.Trainer, split: Split, arrays: dict[str, np.ndarray]) -> bool:
        """Whether the run gets files: they are written only of a whole split."""
        data, num_predictions = training_data(trainer), len(arrays["targets"])
        limit, batches = getattr(trainer, f"limit_{split}_batches"), getattr(trainer, f"num_{split}_batches")
        is_whole = limit == 1 if isinstance(limit, float) else sum(batches) < limit
        if self.run is not None and data is None and not is_whole:
            print(f"limit_{split}_batches {limit}: only {plural(num_predictions, 'image')}; no file is written.")
            return False
        num_images = num_predictions if data is None else data.num_images(split)
        if self.run is not None and num_predictions < num_images:
            of_all, were = plural(num_images, f"{split} image"), "was" if num_predictions == 1 else "were"
            print(f"Only {num_predictions:,} of {of_all} {were} evaluated: no file is written.")
        return self.run is not None and num_predictions == num_images

    def _gather(self, trainer: pl.Trainer, split: Split) -> dict[str, np.ndarray] | None:
        """Return all ranks' arrays in the split's order on rank 0, None elsewhere; every rank must call it."""
        own = (torch.cat(self._logits).numpy(), torch.cat(self._targets).numpy())
        self._logits, self._targets = [], []
        of_ranks = [own]
        if trainer.world_size > 1:
            gathered: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
            torch.distributed.gather_object(own, gathered)
            of_ranks = gathered or []
        if not trainer.is_global_zero:
            return None
        data = training_data(trainer)
        positions = [
            data.rank_positions(split, Rank(rank, trainer.world_size))[: len(targets)]
            if data is not None
            else np.arange(len(targets))
            for rank, (_, targets) in enumerate(of_ranks)
        ]
        num_classes = of_ranks[0][0].shape[1]
        class_names = self.class_names or (data.class_names if data is not None else range(num_classes))
        if len(class_names) != num_classes:
            raise UserError(f"class_names: {len(class_names)} names; the model has {num_classes} classes.")
        order = np.argsort(np.concatenate(positions))
        indices = np.concatenate(positions)[order]
        targets = np.concatenate([targets for _, targets in of_ranks])[order]
        if data is not None and not np.array_equal(targets, data.targets(split, indices)):
            raise UserError(
                f"{type(data).__name__}: {split}_dataloader gives images in another order than rank_positions; "
                "override rank_positions, targets, images and image_names, too."
            )
        names = [index_name(split, at) for at in indices] if data is None else data.image_names(split)[indices]
        return {
            "logits": np.concatenate([logits for logits, _ in of_ranks])[order],
            "targets": targets,
            "indices": indices,
            "names": np.array(names, np.str_),
            "class_names": np.array(list(map(str, class_names))),
        }


def logits_of(pl_module: pl.LightningModule, outputs: Any, batch: Batch) -> Tensor:
    """Return the logits of a batch: what the step returned, alone or as "logits", or else what `forward` returns.

    Raises:
        UserError: The batch is no pair of images and labels, or `forward` returns no logits.
    """
    if not is_labelled(batch):
        raise UserError(
            f"{type(pl_module).__name__}: a batch of (images, labels) is needed, not {type(batch).__name__}."
        )
    given = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
    if isinstance(given, Tensor) and given.ndim == 2 and len(given) == len(batch[1]):
        return given
    logits = None
    if getattr(pl_module.forward, "__func__", None) is not pl.LightningModule.forward:
        with torch.inference_mode():
            logits = pl_module(batch[0])
    if not (isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == len(batch[1])):
        raise UserError(
            f"{type(pl_module).__name__}: its test_step returns no logits (batch, classes), and nor does its forward."
        )
    return logits


def _predictions_of(arrays: dict[str, np.ndarray]) -> Predictions:
    class_names, names = (tuple(arrays[name].tolist()) for name in ("class_names", "names"))
    return Predictions(arrays["logits"], arrays["targets"], arrays["indices"], class_names, names)


def _write_predictions(path: Path, arrays: dict[str, np.ndarray]) -> None:
    probs = torch.from_numpy(arrays["logits"]).softmax(1).numpy()
    _write_npz(path, **arrays, probs=probs)


def _write_npz(path: Path, **arrays: Any) -> None:
    with in_place_of(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
