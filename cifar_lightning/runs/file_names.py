"""Names of all files of a run, and which command writes each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Writer = Literal["fit", "test", "tune", ""]


class RunFile:
    """Descriptor: the path of a file with a fixed name in a run folder.

    Args:
        name: Path relative to the folder.
        by: The command that writes it: fit while it trains, test (also the one at the end of fit), tune.
    """

    def __init__(self, name: str, by: Writer = "") -> None:
        self.name, self.by = name, by

    def __get__(self, run: "RunFiles", kind: type | None = None) -> Path:
        return run.path / self.name


class RunFiles:
    """The paths of all files of a run; `path` is its folder."""

    path: Path

    config = RunFile("config.yaml", "fit")  # all settings, without the path of the run
    split = RunFile("split.json", "fit")  # indices and hashes of the images of each split
    environment = RunFile("environment.json", "fit")  # versions, device, precision, commit
    metrics_csv = RunFile("metrics.csv", "fit")  # a row per epoch: losses, accuracies, lr; no times
    timing_csv = RunFile("timing.csv", "fit")  # a row per epoch: seconds, images/s, memory
    checkpoints = RunFile("checkpoints")  # the folder of the next three
    best_checkpoint = RunFile("checkpoints/best.ckpt", "fit")  # the weights with the best val/acc, which are tested
    last_checkpoint = RunFile("checkpoints/last.ckpt", "fit")  # the state that training resumes from
    previous_checkpoint = RunFile("checkpoints/previous.ckpt", "fit")  # the one before last.ckpt, if that is damaged
    test_metrics = RunFile("test_metrics.json", "test")  # see `metrics.classification.test_metrics`
    confusion_matrix_pt = RunFile("confusion_matrix.pt", "test")  # int64 tensor; rows: true class
    confusion_matrix_csv = RunFile("confusion_matrix.csv", "test")  # the same with class names
    confusion_matrix_png = RunFile("confusion_matrix.png", "test")
    predictions = RunFile("predictions.npz", "test")  # logits, targets, indices of the test split
    predictions_val = RunFile("predictions_val.npz", "test")  # the same of the validation split
    gallery = RunFile("gallery.npz", "test")  # at most 500 uint8 images of the report: a copied run needs no data set
    findings = RunFile("findings.json", "test")  # every number of the report
    report = RunFile("report.html", "test")  # one self-contained page
    lr_range = RunFile("lr_range.json", "tune")  # result of the LR finder (`tune`, `fit --tune_lr`)
    lr_range_png = RunFile("lr_range.png", "tune")
    lock_file = RunFile(".lock")  # locked while the run is written; marks the folder as a run
    tensorboard = "events.out.tfevents.*"  # pattern of TensorBoard's files

    def files_by(self, *commands: Writer) -> list[Path]:
        """Return the paths of the files that some commands write, whether they exist or not."""
        return [self.path / file.name for file in _FILES if file.by in commands]

    def written_files(self) -> Iterator[Path]:
        """Yield the existing files with names that a run writes, except the lock file."""
        for file in self.files_by("fit", "test", "tune"):
            if file.parent == self.path:
                yield from self.path.glob(file.name)
        yield from self.path.glob(self.tensorboard)
        yield from self.checkpoints.glob("[!.]*.ckpt*")
        yield from self.leftovers()

    def leftovers(self) -> Iterator[Path]:
        """Yield temporary files that a killed process left behind."""
        for file in _FILES:
            path = self.path / file.name
            yield from path.parent.glob(f".{path.name}.*.tmp")


_FILES = [file for file in vars(RunFiles).values() if isinstance(file, RunFile)]
