"""Images classified by `predict_images` against one image at a time.

    python -m benchmarks.speed.predict                         SmallNet with random weights, 1,000 random 32x32 PNGs
    python -m benchmarks.speed.predict RUN FOLDER [--num N]    a run's model, or smallnet; N images, drawn evenly
    python -m benchmarks.speed.predict --model resnet18 --image_size 224 --side 500 --num 200      JPEGs of 500x500
    python -m benchmarks.speed.predict --command               also one command for each image

The loop opens an image, converts it to a tensor and runs the same model on it in float32, all in this process, without
TTA, which is left out of both; both run in turn, several rounds, and are compared within a round. Reading the
checkpoint is not timed: a loop would also do it once. Random weights stay in float32, as their logits are all close.
"""

import argparse
import contextlib
import io
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from benchmarks import ROOT
from benchmarks.hardware import hardware_name, results_file
from benchmarks.speed.results import spread, write_results
from cifar_lightning import ImageClassifier
from cifar_lightning.inference import predict_images as predict
from cifar_lightning.inference.predict_images import find_images, predict_images
from cifar_lightning.inference.trained_model import TrainedModel, load_trained_model
from cifar_lightning.runs.folder import RunFolder, open_model

PROGRAM = ROOT / "train.py"
NUM_STARTS = 3  # of the command, each round


def make_run(path: Path, model: str = "smallnet", image_size: int = 32) -> RunFolder:
    """Write a run of a model with random weights."""
    run = RunFolder(path)
    run.checkpoints.mkdir(parents=True)
    run.config.write_text("{}\n")
    torch.manual_seed(0)
    module = ImageClassifier(model, 10, image_size)
    data = {"class_names": [f"class {k}" for k in range(10)], "image_size": image_size}
    data |= {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "epoch": 0}
    torch.save(checkpoint | {"ImageDataModule": data}, run.best_checkpoint)
    return run


def make_images(folder: Path, num: int, side: int | None = None) -> None:
    """Write random PNGs of 32x32 pixels, or such images enlarged to JPEGs of `side` pixels."""
    folder.mkdir()
    for k, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (num, 32, 32, 3), dtype=np.uint8)):
        image = Image.fromarray(pixels)
        if side is None:
            image.save(folder / f"{k:06}.png")
        else:
            image.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{k:06}.jpg")


def loop(trained: TrainedModel, paths: Sequence[Path], output: Path) -> list[int]:
    """Classify one image at a time, of the model's image size, as one would by hand; return the classes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = trained.model.to(device)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (trained.mean, trained.std))
    size = trained.image_size
    preds = []
    with torch.inference_mode(), output.open("w", encoding="utf-8") as file:
        for path in paths:
            with Image.open(path) as opened:
                raw_image = opened.convert("RGB")
            if raw_image.size != (size, size):
                raw_image = raw_image.resize((size, size), Image.Resampling.BICUBIC)
            image = torch.from_numpy(np.array(raw_image)).to(device).permute(2, 0, 1).float() / 255
            probs, classes = model(((image - mean) / std)[None]).softmax(1)[0].topk(3)
            preds.append(int(classes[0]))
            names = [trained.class_names[k] for k in classes.tolist()]
            file.write(",".join(map(str, (path, *itertools.chain(*zip(names, probs.tolist(), strict=True))))) + "\n")
    return preds


def compare(run: RunFolder, paths: Sequence[Path], rounds: int) -> dict[str, list[float]]:
    """Run both in turn, `rounds` times after a warm-up; return the seconds of each round."""
    trained = replace(load_trained_model(run), tta="none")
    times_s: dict[str, list[float]] = {"loop": [], "predict_images": []}
    read_before = mock.patch.object(predict, "load_trained_model", return_value=trained)
    with tempfile.TemporaryDirectory() as folder, read_before, contextlib.redirect_stdout(io.StringIO()):
        ours, theirs = Path(folder) / "ours.jsonl", Path(folder) / "theirs.csv"
        for _ in range(rounds + 1):
            began = time.perf_counter()
            preds = loop(trained, paths, theirs)
            middle = time.perf_counter()
            predict_images(run, paths, output=ours, force=True)
            times_s["loop"].append(middle - began)
            times_s["predict_images"].append(time.perf_counter() - middle)
        classes = [json.loads(line)["class"] for line in ours.read_text(encoding="utf-8").splitlines()]
    equal = sum(name == trained.class_names[k] for name, k in zip(classes, preds, strict=True))
    print(f"same class from both: {equal:,} of {len(paths):,}")
    return {way: times[1:] for way, times in times_s.items()}


def command_s(run: RunFolder, paths: Sequence[Path], num_starts: int) -> float:
    """Return the mean seconds of the whole command for these images, from the start of Python to its end."""
    command = [sys.executable, str(PROGRAM), "predict-images", str(run.path), *map(str, paths), "--output", "-"]
    began = time.perf_counter()
    for _ in range(num_starts):
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return (time.perf_counter() - began) / num_starts


def report(what: str, ratios: Sequence[float], num: int) -> None:
    """Print what was compared, how often and on which device."""
    where = f"{hardware_name()}, {torch.get_num_threads()} threads of torch"
    print(f"{what}, seconds for {num:,} images, {len(ratios)} rounds, {where}: {spread(ratios, 2)}")


def main() -> None:
    """Measure and print; the last line is `ratio=X`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="a run, or smallnet; by default SmallNet with random weights")
    parser.add_argument("folder", nargs="?", type=Path, help="a folder of images; by default random ones")
    parser.add_argument("--model", default="smallnet", help="without RUN: of this name (default smallnet)")
    parser.add_argument("--image_size", type=int, default=32, help="without RUN: of the model (default 32)")
    parser.add_argument("--side", type=int, help="without FOLDER: JPEGs of this many pixels a side in place of PNGs")
    parser.add_argument("--num", type=int, default=1000, help="images (default 1000)")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of both (default 5)")
    parser.add_argument("--command", action="store_true", help="also compare with one command per image")
    parser.add_argument("--json", type=results_file, help="write all results to this file")
    args = parser.parse_args()
    if args.run is not None and args.folder is None:
        parser.error("give RUN and a folder of images, or neither")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "images"
        if args.folder is None:
            make_images(folder, args.num, args.side)
        run = open_model(args.run) if args.run else make_run(Path(temporary) / "run", args.model, args.image_size)
        found = find_images([folder])[0]
        paths = [Path(path) for path in found[:: max(1, len(found) // args.num)][: args.num]]
        times_s = compare(run, paths, args.rounds)
        for way, times in times_s.items():
            print(f"{way:<16} {1e6 * statistics.median(times) / len(paths):9,.0f} microseconds an image")
        of_loop = [slow / fast for slow, fast in zip(times_s["loop"], times_s["predict_images"], strict=True)]
        ratios = of_loop
        report("loop of one image at a time over predict_images", ratios, len(paths))
        if args.command:
            times_s |= {"command an image": [], "command for all": []}
            for _ in range(args.rounds):
                times_s["command an image"].append(len(paths) * command_s(run, paths[:1], NUM_STARTS))
                times_s["command for all"].append(command_s(run, paths, 1))
            both = zip(times_s["command an image"], times_s["command for all"], strict=True)
            ratios = [slow / fast for slow, fast in both]
            report(f"one command an image (from {NUM_STARTS} starts a round) over one for all", ratios, len(paths))
    write_results(args.json, num_images=len(paths), seconds=times_s, ratios=of_loop)
    print(f"ratio={statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
