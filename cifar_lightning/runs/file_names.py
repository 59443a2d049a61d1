"""Names of all files of a run, and which command writes each."""

import contextlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Writer = Literal["fit", "test", "tune", "skip", "compare", ""]
WRITERS: tuple[Writer, ...] = ("fit", "test", "tune", "skip", "compare")
MAX_JSON_BYTES = 256 << 20  # the split of 20 million images


class RunFile:
    """Descriptor: the path of a file with a fixed name in a run folder.

    Args:
        name: Path relative to the folder.
        by: The command that writes it: fit while it trains, test (also the one at the end of fit), tune; skip, for a
            file that fit writes only where it leaves files of the data out; or compare: `analyze --compare`.
        text: What it holds, as the terminal lists it; empty for a file that is not listed.
    """

    def __init__(self, name: str, by: Writer = "", text: str = "") -> None:
        self.name, self.by, self.text = name, by, text

    def __get__(self, run: "RunFiles", kind: type | None = None) -> Path:
        return run.path / self.name


class RunFiles:
    """The paths of all files of a run; `path` is its folder."""

    path: Path

    checkpoints = RunFile("checkpoints")  # the folder of the next three
    best_checkpoint = RunFile("checkpoints/best.ckpt", "fit", "weights with the best validation accuracy")
    last_checkpoint = RunFile("checkpoints/last.ckpt", "fit", "state at the end of training, for --resume")
    previous_checkpoint = RunFile("checkpoints/previous.ckpt", "fit")  # the one before last.ckpt, if that is damaged
    config = RunFile("config.yaml", "fit", "all settings of the run")
    split = RunFile("split.json", "fit", "indices of the training and validation images")  # and hashes of all images
    environment = RunFile("environment.json", "fit", "versions, device, precision, commit")
    skipped_files = RunFile("skipped_files.jsonl", "skip", "files of the data that are left out, with the reasons")
    metrics_csv = RunFile("metrics.csv", "fit", "loss, accuracy and learning rate of each epoch")  # no times
    learning_rates = RunFile("learning_rates.json", "fit")  # of at most 2,000 steps
    timing_csv = RunFile("timing.csv", "fit", "seconds, images/s and memory of each epoch")
    report = RunFile("report.html", "test", "this report with charts and images; open in a browser")
    findings = RunFile("findings.json", "test", "every number of the page")
    test_metrics = RunFile("test_metrics.json", "test", "accuracy, loss, precision and recall of each class")
    confusion_matrix_png = RunFile("confusion_matrix.png", "test", "confusion matrix; also as .csv and .pt")
    confusion_matrix_csv = RunFile("confusion_matrix.csv", "test")  # with class names; rows: true class
    confusion_matrix_pt = RunFile("confusion_matrix.pt", "test")  # int64 tensor
    predictions = RunFile("predictions.npz", "test", "logits and label of every test image")  # and its index
    predictions_val = RunFile("predictions_val.npz", "test", "logits and label of every validation image")
    predictions_csv = RunFile("predictions.csv", "test", "prediction and loss of every test and validation image")
    mistakes_csv = RunFile("mistakes.csv", "test", "wrong predictions of test and validation, by loss")
    label_issues = RunFile("label_issues.csv", "test", "test and validation images whose label may be wrong")
    gallery = RunFile("gallery.npz", "test", "test images shown in the report")  # at most 500: it needs no data set
    explanations = RunFile("explanations.npz", "test", "Grad-CAM and nearest training images of mistakes")
    lr_range = RunFile("lr_range.json", "tune")  # result of the LR finder (`tune`, `fit --tune_lr`)
    lr_range_png = RunFile("lr_range.png", "tune")
    comparison = RunFile("comparison.html", "compare", "comparison with other runs; open in a browser")
    comparison_json = RunFile("comparison.json", "compare", "every number of that page")
    seeds = RunFile("seeds.json")  # in the folder that holds a run for each seed: the seeds, mean and spread
    exported_onnx = RunFile("model.onnx")  # by `export`, as the next two
    exported_program = RunFile("model.pt2")
    exported_weights = RunFile("model.safetensors")  # a model that comes with the package has no other weights
    lock_file = RunFile(".lock")  # locked while the run is written; marks the folder as a run
    tensorboard = "events.out.tfevents.*"  # pattern of TensorBoard's files

    @property
    def listed_files(self) -> list[tuple[str, str]]:
        """The names of the existing files that the terminal lists, and what each holds."""
        listed = [(file.name, file.text) for file in _FILES if file.text and (self.path / file.name).exists()]
        return listed + [(self.tensorboard, "logs for TensorBoard")] * any(self.path.glob(self.tensorboard))

    def files_by(self, *commands: Writer) -> list[Path]:
        """Return the paths of the files that some commands write, whether they exist or not."""
        return [self.path / file.name for file in _FILES if file.by in commands]

    def written_files(self) -> Iterator[Path]:
        """Yield the existing files with names that a run writes, except the lock file."""
        for file in self.files_by(*WRITERS):
            if file.parent == self.path:
                yield from self.path.glob(file.name)
        yield from self.path.glob(self.tensorboard)
        yield from self.checkpoints.glob("[!.]*.ckpt*")
        yield from self.leftovers()

    def irregular_files(self) -> Iterator[Path]:
        """Yield what has the name of a run's file and is a link, a folder, a FIFO or a device; or such a folder."""
        for path in (*(self.path / file.name for file in _FILES), *self.path.glob(self.tensorboard)):
            with contextlib.suppress(OSError):  # missing
                is_expected = stat.S_ISDIR if path == self.checkpoints else stat.S_ISREG
                if not is_expected(path.lstat().st_mode):
                    yield path

    def leftovers(self) -> Iterator[Path]:
        """Yield temporary files that a killed process left behind."""
        for file in _FILES:
            path = self.path / file.name
            yield from path.parent.glob(f".{path.name}.*.tmp")


_FILES = [file for file in vars(RunFiles).values() if isinstance(file, RunFile)]
