"""Four short runs with fixed seeds: what a change of the code's structure must leave equal.

    python -m benchmarks.accuracy.fixed_runs record FILE                    write down what they give with this checkout
    python -m benchmarks.accuracy.fixed_runs compare FILE                   run them again and compare
    python -m benchmarks.accuracy.fixed_runs compare FILE --program ../old/train.py

The runs: the default recipe; SpeedNet with Muon, progressive image sizes and six views; MixUp with a policy, erasing,
EMA and two workers; class folders with balanced weights and accumulated gradients. All are of generated images, on the
CPU in 32 bits, with one thread, so that a processor gives the same numbers each time; two kinds of processor do not.

What is compared: metrics.csv byte for byte, predictions.npz array for array, and of last.ckpt each tensor and number of
the model, the optimizer and the schedule.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import ROOT
from benchmarks.hardware import hardware_name

SYNTHETIC = ["--data.dataset", "synthetic", "--data.limit", "600", "--batch_size", "60", "--data.image_size", "16"]
NARROW = ["--model.model_kwargs", "{widths: [8, 16, 16]}"]
RUNS = {
    "default": ["--data.dataset", "synthetic", "--data.limit", "1000", "--epochs", "2"],
    "speednet": [
        *(*SYNTHETIC, "--data.image_size", "32", "--data.train_sizes", "[24, 28, 32]", "--data.flip", "alternating"),
        *("--model.name", "speednet", "--model.model_kwargs", "{widths: [8, 16, 16]}", "--model.optimizer", "muon"),
        *("--model.schedule", "linear", "--lr", "0.1", "--model.tta", "six", "--epochs", "3"),
    ],
    "mixup": [
        *(*SYNTHETIC, *NARROW, "--model.mixup", "0.2", "--data.policy", "trivial", "--data.erasing", "0.25"),
        *("--model.ema_decay", "0.9", "--data.num_workers", "2", "--epochs", "3"),
    ],
    "folders": [
        *("--data.dataset", "folder", "--data.root", "IMAGES", "--data.image_size", "16", "--batch_size", "20"),
        *(*NARROW, "--data.class_weights", "balanced", "--trainer.accumulate_grad_batches", "2", "--epochs", "3"),
    ],
}


def make_folders(root: Path) -> None:
    """Write class folders of noise around a colour of the class: sizes differ, and classes are uneven."""
    rng = np.random.default_rng(0)
    for split, counts in (("train", (90, 60, 30)), ("test", (20, 20, 20))):
        for label, count in enumerate(counts):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                height, width = rng.integers(16, 40, 2)
                image = rng.integers(0, 160, (height, width, 3)) + 32 * (np.arange(3) == label)
                Image.fromarray(image.astype(np.uint8)).save(folder / f"{index:03}.png")


def hashed(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path of each tensor and number in nested containers, with a hash or its text."""
    if isinstance(value, torch.Tensor):
        content = value.detach().contiguous()
        digest = hashlib.sha256(content.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        yield key, f"{value.dtype} {tuple(value.shape)} {digest[:24]}"
    elif isinstance(value, dict):
        for name in value:
            yield from hashed(value[name], f"{key}/{name}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from hashed(item, f"{key}/{index}")
    elif isinstance(value, bool | int | float | str | None):
        yield key, repr(value)


def describe(run: Path) -> dict[str, Any]:
    """Return what is compared of a run folder."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    with np.load(run / "predictions.npz") as arrays:
        predictions = {name: arrays[name] for name in arrays.files}
    return {
        "metrics.csv": hashlib.sha256((run / "metrics.csv").read_bytes()).hexdigest(),
        "predictions.npz": {
            name: f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()[:24]}"
            for name, array in sorted(predictions.items())
        },
        "last.ckpt": {
            key: dict(hashed(checkpoint[key])) for key in ("state_dict", "optimizer_states", "lr_schedulers")
        },
        "step": checkpoint["global_step"],
    }


def run_all(program: Path) -> dict[str, Any]:
    """Train the four runs with a program and describe them."""
    found = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        make_folders(Path(folder) / "images")
        for name, flags in RUNS.items():
            command = [sys.executable, str(program), "fit", "--run_dir", f"{folder}/{name}"]
            command += [f"{folder}/images" if flag == "IMAGES" else flag for flag in flags]
            command += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8")
            if done.returncode != 0:
                raise SystemExit(f"{name}: exit {done.returncode}\n{done.stderr}")
            found[name] = describe(Path(folder) / name)
            print(f"{name}: {found[name]['step']} steps", flush=True)
    return found


def differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """Yield the path of each value that two descriptions do not share."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            yield from differences(before.get(name), now.get(name), f"{key}/{name}")
    elif before != now:
        yield f"{key}: {before} before, {now} now"


def main() -> None:
    """Record or compare; exit 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path, help="JSON file of a record")
    parser.add_argument("--program", type=Path, default=ROOT / "train.py", help="train.py")
    args = parser.parse_args()
    about = {"hardware": hardware_name(), "torch": torch.__version__}
    if args.action == "compare" and (of_file := json.loads(args.file.read_text(encoding="utf-8"))["about"]) != about:
        raise SystemExit(f"{args.file}: was recorded with {of_file}, which gives other numbers than {about}.")
    found = run_all(args.program.resolve())
    if args.action == "record":
        args.file.write_text(json.dumps({"about": about, "runs": found}, indent=1) + "\n", encoding="utf-8")
        return
    lines = list(differences(json.loads(args.file.read_text(encoding="utf-8"))["runs"], found))
    print("\n".join(lines[:40]) or "All four runs are equal.")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
