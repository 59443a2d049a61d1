"""Every command on runs with data, transforms, models, losses, optimizers and classes of one's own.

    python -m benchmarks.faults.own_code --python ENV/bin/python --json benchmarks/results/own_code.json

A row is one thing of one's own, given to `fit` on the command line; a column is what must work with it:

    fit       trains to its end and writes every file of a run
    resume    a run killed by SIGKILL inside its last epoch resumes to the tensors and numbers of the unbroken run
    test      `test RUN` gives the accuracy of the run again
    predict   `predict-images RUN FOLDER` predicts every image
    export    `export RUN --format onnx` agrees with PyTorch on the run's test images (the command compares them)
    analyze   `analyze RUN` writes report.html

`--python` is an interpreter whose environment has cifar_lightning installed, with its export extra, and `datasets` for
the row of a Hugging Face data set. Programs start in a temporary folder, which holds the code and the images of the
rows, and not in the repository. Prints a table, and last `ratio=`: cells that hold over all cells.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.faults.judge import differences, load
from benchmarks.speed.results import write_results
from cifar_lightning.data.synthetic import CLASS_NAMES, draw
from cifar_lightning.runs.folder import RunFolder

COLUMNS = ("fit", "resume", "test", "predict", "export", "analyze")
SIZE, NUM_TRAIN, NUM_TEST, NUM_CLASSES = 16, 180, 60, 3
TIMEOUT_S = 240
MINE = """
import numpy as np
import torch
from cifar_lightning import ImageClassifier, ImageDataModule, Transform
from torch import nn
from torch.nn import functional as F

saved = np.load("images.npz")
CLASSES = ["red", "green", "blue"]


class Photos(torch.utils.data.Dataset):
    classes = CLASSES

    def __init__(self, split):
        self.images, self.targets = saved[split], saved[split + "_targets"]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return torch.from_numpy(self.images[index]).permute(2, 0, 1) / 255, int(self.targets[index])


def dataset():
    return Photos("train")


def pair():
    return Photos("train"), Photos("test")


def hugging_face():
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    return datasets.DatasetDict({
        split: datasets.Dataset.from_dict(
            {"image": list(saved[split]), "label": saved[split + "_targets"].tolist()}, features=features
        )
        for split in ("train", "test")
    })


def arrays():
    return (saved["train"], saved["train_targets"]), (saved["test"], saved["test_targets"])


class Noise(Transform):
    stage = "float"

    def __init__(self, std: float = 0.1):
        self.std = std

    def draw(self, generator, num_images, image_size):
        return {"seed": torch.randint(1 << 30, (num_images,), generator=generator)}

    def apply(self, images, rows):
        seeds = rows["seed"].tolist()
        noise = [torch.randn(images[0].shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return images + self.std * torch.stack(noise).to(images)


class Net(nn.Module):
    def __init__(self, num_classes: int, width: int = 8):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))


class FocalLoss(nn.Module):
    def __init__(self, gamma: float = 2.0):
        super().__init__()
        self.gamma = gamma

    def forward(self, logits, labels):
        loss = F.cross_entropy(logits, labels, reduction="none")
        return ((1 - (-loss).exp()) ** self.gamma * loss).mean()


class Classifier(ImageClassifier):
    def __init__(self, *args, penalty: float = 0.01, **kwargs):
        super().__init__(*args, **kwargs)
        self.penalty = penalty

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.penalty * sum(p.abs().mean() for p in self.parameters())


class DataModule(ImageDataModule):
    def __init__(self, *args, gain: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = gain
"""
OWN_DATA = ["--data.dataset", "mine:pair"]
FOLDER = ["--data.dataset", "folder", "--data.root"]
ROWS: dict[str, list[str]] = {
    "Dataset": ["--data.dataset", "mine:dataset"],
    "(train, test) pair": OWN_DATA,
    "Hugging Face set": ["--data.dataset", "mine:hugging_face"],
    "arrays": ["--data.dataset", "mine:arrays"],
    "flat folder": [*FOLDER, "flat", "--data.image_size", str(SIZE)],
    "CSV": [*FOLDER, "loose", "--data.labels", "labels.csv", "--data.image_size", str(SIZE)],
    "v2 transform": [*OWN_DATA, "--data.transforms+=torchvision.transforms.v2.RandomPerspective"],
    "own batched transform": [*OWN_DATA, "--data.transforms+=mine.Noise"],
    "model by path": [*OWN_DATA, "--model.name", "mine:Net", "--model.model_kwargs", "{width: 6}"],
    "own loss": [*OWN_DATA, "--model.loss", "mine:FocalLoss"],
    "optimizer with scheduler": [
        *OWN_DATA,
        *("--optimizer", "torch.optim.RAdam", "--optimizer.lr", "0.01"),
        *("--lr_scheduler", "torch.optim.lr_scheduler.StepLR", "--lr_scheduler.step_size", "1"),
    ],
    "subclasses of both classes": [
        *("--data", "mine.DataModule", *OWN_DATA, "--data.gain", "2"),
        *("--model", "mine.Classifier", "--model.penalty", "0.1"),
    ],
}


def make_place(folder: Path) -> None:
    """Write the rows' code and images: arrays, a flat folder of class folders, loose files with a CSV."""
    (folder / "mine.py").write_text(MINE)
    names, arrays = CLASS_NAMES[:NUM_CLASSES], {}
    for split, num in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        images, targets = draw(split, 10 * num, SIZE)
        chosen = np.flatnonzero(targets < NUM_CLASSES)[:num]
        arrays |= {split: images[chosen], f"{split}_targets": targets[chosen]}
    np.savez(folder / "images.npz", **arrays)
    (folder / "loose").mkdir()
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "split"])
        for split in ("train", "test"):
            for index, (image, target) in enumerate(zip(arrays[split], arrays[f"{split}_targets"], strict=True)):
                path = folder / "flat" / names[target] / f"{split}{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
                shutil.copy(path, folder / "loose" / path.name)
                table.writerow([path.name, names[target], split])


class Row:
    """Runs a row's commands in `folder`."""

    def __init__(self, folder: Path, python: str, flags: list[str]) -> None:
        self.folder, self.python = folder, python
        model = [] if "--model.name" in flags else ["--model.model_kwargs", "{widths: [8, 8, 8], dropout: 0.2}"]
        lr = [] if "--optimizer" in flags else ["--lr", "0.01"]
        common = ["--batch_size", "16", "--epochs", "3", "--trainer.accelerator", "cpu"]
        self.fit_flags = ["fit", *flags, *model, *lr, *common, "--checkpoint.every_n_train_steps", "2"]
        self.trust = ["--trust_code", "true"] if "mine" in " ".join(flags) else []

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start the program."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [self.python, "-m", "cifar_lightning", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, *arguments: str) -> str:
        """Run the program to its end and return what it printed.

        Raises:
            AssertionError: Its exit status is not 0.
        """
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode == 0, f"{' '.join(arguments)}: exit status {process.returncode}: {err[-500:]}"
        return out

    def fit(self) -> None:
        """Train an unbroken run."""
        self.run(*self.fit_flags, "--run_dir", "whole")
        run = RunFolder(self.folder / "whole")
        missing = [file.name for file in run.files_by("fit", "test") if not file.exists()]
        assert not missing, f"lacks {', '.join(missing)}"

    def resume(self) -> None:
        """Kill a run inside its last epoch, resume it, and compare it with the unbroken one."""
        process = self.start(*self.fit_flags, "--run_dir", "killed")
        killed, whole = RunFolder(self.folder / "killed"), RunFolder(self.folder / "whole")
        deadline = time.monotonic() + TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            rows = killed.metrics_csv.read_text().count("\n") if killed.metrics_csv.exists() else 0
            written = killed.last_checkpoint.stat().st_mtime_ns if killed.last_checkpoint.exists() else 0
            if rows >= 2 and written > killed.metrics_csv.stat().st_mtime_ns:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
        out = self.run("fit", "--resume", "killed", *self.trust)
        assert "resum" in out.lower(), out[:300]
        assert killed.metrics_csv.read_bytes() == whole.metrics_csv.read_bytes(), "metrics.csv differs"
        differ = differences(load(killed.last_checkpoint), load(whole.last_checkpoint))
        assert not differ, f"last.ckpt differs: {differ[:3]}"

    def test(self) -> None:
        """Test the run again."""
        run = RunFolder(self.folder / "whole")
        before = json.loads(run.test_metrics.read_text())
        self.run("test", "whole", *self.trust)
        assert json.loads(run.test_metrics.read_text()) == before, "test_metrics.json differs"

    def predict(self) -> None:
        """Predict a folder of images."""
        self.run("predict-images", "whole", "loose", "--output", "predictions.csv", *self.trust)
        with (self.folder / "predictions.csv").open() as file:
            assert len(list(csv.DictReader(file))) == NUM_TRAIN + NUM_TEST, "not every image is predicted"

    def export(self) -> None:
        """Export to ONNX; the command itself compares the predictions."""
        out = self.run("export", "whole", "--format", "onnx", "--output", "model.onnx", *self.trust)
        assert "largest difference of a probability" in out, out[-300:]

    def analyze(self) -> None:
        """Write the report again."""
        report = RunFolder(self.folder / "whole").report
        report.unlink()
        self.run("analyze", "whole")
        assert report.stat().st_size > 10_000, "no report"

    def cells(self) -> dict[str, str]:
        """Return "ok" or what failed, by column."""
        cells = {}
        for name in COLUMNS:
            try:
                getattr(self, name)()
                cells[name] = "ok"
            except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
                cells[name] = " ".join(str(error).split())
        return cells


def main() -> None:
    """Run the rows and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter that has cifar_lightning installed")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), help="only these rows")
    parser.add_argument("--json", type=Path, help="write the table here")
    options = parser.parse_args()
    results = {}
    print(f"| | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}", flush=True)
    for name in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            make_place(Path(folder))
            results[name] = Row(Path(folder), options.python, ROWS[name]).cells()
        print(f"| {name} | {' | '.join(results[name].values())} |", flush=True)
    num_ok = sum(cell == "ok" for row in results.values() for cell in row.values())
    num_cells = len(results) * len(COLUMNS)
    write_results(options.json, rows=results)
    print(f"{num_ok} of {num_cells} cells hold\nratio={num_ok / num_cells:.3f}")


if __name__ == "__main__":
    main()
