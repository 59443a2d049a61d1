"""What each part of a training gives alone: the same short run with one flag changed, paired by seed.

    python benchmarks/ablations.py --data ROOT                    SmallNet on 5,000 images, every part, seed 0
    python benchmarks/ablations.py --data ROOT --seeds 1,2 --only ema,cutmix
    python benchmarks/ablations.py --data ROOT --suite stems      ResNet-18, stem for small images or ImageNet's

Accuracy is that on validation images, so that test stays for the runs that are reported; they are as many as a split
allows, since one image in a hundred is what is looked for. With --json runs are added to the file and those that are
there already are left out, so that seeds add up. The last line is the best part's accuracy over the base's.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cifar_lightning.runs.environment import describe_environment

HERE = Path(__file__).resolve().parent
BASE = "base"
# Student's two-sided 5 % for n seeds.
_T_QUANTILES = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


@dataclass(frozen=True)
class Suite:
    """Runs that are compared.

    Attributes:
        about: What the base is, in words.
        flags: Of every run.
        parts: Name -> flags that are added; those of `views` are given to `validate` on the base's run instead.
        views: The parts that change no training.
    """

    about: str
    flags: list[str]
    parts: Mapping[str, list[str]]
    views: tuple[str, ...] = ()


SUITES = {
    "training": Suite(
        "SmallNet at half width (32, 64, 128) on 5,000 images, Muon, 15 epochs; 20,000 validation images",
        [
            "--data.limit=25000",
            "--data.val_fraction=0.8",
            "--epochs=15",
            "--trainer.check_val_every_n_epoch=15",
            "--model.optimizer=muon",
            "--lr=0.05",
            "--model.model_kwargs={widths: [32, 64, 128], dropout: 0.0}",
        ],
        {
            BASE: [],
            "mirror": ["--model.tta=mirror"],
            "six views": ["--model.tta=six"],
            "ema": ["--model.ema_decay=0.99"],
            "mixup": ["--model.mixup=0.2"],
            "cutmix": ["--model.cutmix=1"],
            "trivial": ["--data.policy=trivial"],
            "rand": ["--data.policy=rand"],
            "erasing": ["--data.erasing=0.25"],
            "cutout": ["--data.cutout_px=8"],
            "alternating flip": ["--data.flip=alternating"],
            "no smoothing": ["--model.label_smoothing=0"],
            "linear": ["--model.schedule=linear", "--model.pct_start=0.1"],
            "cosine": ["--model.schedule=cosine", "--model.pct_start=0.1"],
            "half the rate": ["--lr=0.025"],
            "a quarter of it": ["--lr=0.0125"],
            "sgd": ["--model.optimizer=sgd", "--lr=0.1", "--model.weight_decay=0.0005"],
            "adamw": ["--model.optimizer=adamw", "--lr=0.003"],
        },
        ("mirror", "six views"),
    ),
    "stems": Suite(
        "ResNet-18 with ImageNet's stem, 300 steps of 64 images, AdamW; 5,000 validation images",
        [
            "--data.limit=24200",  # 300 x 64, and 5,000
            "--data.val_fraction=0.2066",
            "--epochs=1",
            "--batch_size=64",
            "--lr=0.001",
            "--model.name=resnet18",
        ],
        {BASE: ["--model.model_kwargs={keep_stem: true}"], "small stem": []},
    ),
}


def measure(suite: Suite, part: str, seed: int, data: str, run: Path) -> dict[str, Any]:
    """Run a part once, or its views on the base's run; return its figures."""
    started_s = time.perf_counter()
    if part in suite.views:
        execute(["validate", str(run), *suite.parts[part]])
    else:
        flags = [*suite.flags, *suite.parts[part], "--data.dataset=folder", f"--data.root={data}", f"--run_dir={run}"]
        flags += [f"--seed_everything={seed}", f"--data.seed={seed}", "--trainer.limit_test_batches=1"]
        execute(["fit", *flags])
    answers = np.load(run / "predictions_val.npz")
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    return {
        "accuracy": float((answers["logits"].argmax(1) == answers["targets"]).mean()),
        "num_pictures": len(answers["targets"]),
        "seconds": time.perf_counter() - started_s,
        "precision": environment["precision"],
        "commit": environment["commit"],
        "dirty": environment["dirty"],
    }


def execute(arguments: list[str]) -> None:
    """Run the program quietly; its last lines become the error where it fails."""
    command = [sys.executable, str(HERE.parent / "train.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=dict(os.environ))
    if done.returncode != 0:
        sys.exit("\n".join(done.stderr.strip().splitlines()[-3:]))


def differences(lines: list[dict[str, Any]], part: str) -> list[float]:
    """Return how much more of the images a part has right than the base, in points, seed by seed."""
    by_seed = {
        name: {line["seed"]: 100 * line["accuracy"] for line in lines if line["part"] == name} for name in (BASE, part)
    }
    return [by_seed[part][seed] - by_seed[BASE][seed] for seed in sorted(by_seed[BASE].keys() & by_seed[part].keys())]


def verdict(points: list[float], num_images: int) -> str:
    """Return the mean difference with its spread, and whether it is more than chance makes of such runs."""
    mean = statistics.mean(points)
    if len(points) == 1:
        # Of the images alone, as if the answers were independent: that of the seed is not known from one.
        chance = 200 * math.sqrt(2 * 0.2 * 0.8 / num_images)
        told = "cannot tell" if abs(mean) < chance else "one seed alone"
        return f"{mean:+.2f} points (n=1, no spread): {told}"
    spread = statistics.stdev(points)
    beyond = _T_QUANTILES[min(len(points), max(_T_QUANTILES))] * spread / math.sqrt(len(points))
    told = "cannot tell" if abs(mean) < beyond else "more than chance"
    return f"{mean:+.2f} points (± {spread:.2f}, n={len(points)}): {told}"


def main() -> None:
    """Measure and print; the last line is `ratio=X`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="training")
    parser.add_argument("--data", required=True, help="class folders of CIFAR-10")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--only", type=lambda text: text.split(","), help="these parts beside the base")
    parser.add_argument("--precision", help="of all runs, such as bf16-mixed")
    parser.add_argument("--json", type=Path, help="add the runs to this file")
    args = parser.parse_args()
    suite = SUITES[args.suite]
    unknown = sorted(set(args.only or ()) - (suite.parts.keys() - {BASE}))
    if unknown:
        parser.error(f"--only {unknown[0]}: of {args.suite} there are {', '.join(suite.parts)}")
    if args.precision:
        suite.flags.append(f"--trainer.precision={args.precision}")
    every = json.loads(args.json.read_text(encoding="utf-8")) if args.json and args.json.exists() else []
    lines = [line for line in every if (line["suite"], line["asked_precision"]) == (args.suite, args.precision)]
    wanted = [part for part in suite.parts if not args.only or part == BASE or part in args.only]
    hardware = {key: describe_environment()[key] for key in ("num_usable_cpus", "cpu")}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for part in wanted:
                is_there = any((line["part"], line["seed"]) == (part, seed) for line in lines)
                is_needed = part == BASE and any(
                    view in wanted and not any((line["part"], line["seed"]) == (view, seed) for line in lines)
                    for view in suite.views
                )
                if is_there and not is_needed:
                    continue
                run = Path(folder) / (BASE if part in suite.views else part)
                figures = measure(suite, part, seed, args.data, run)
                if not is_there:
                    lines.append({"suite": args.suite, "part": part, "seed": seed, **figures, **hardware})
                    lines[-1]["asked_precision"] = args.precision
                    every.append(lines[-1])
                print(
                    f"seed {seed}, {part}: {100 * figures['accuracy']:.2f} % in {figures['seconds']:.0f} s", flush=True
                )
                if args.json:
                    args.json.write_text(json.dumps(every, indent=2) + "\n", encoding="utf-8")
    print(f"{suite.about}; difference to it, paired by seed, {hardware['num_usable_cpus']} cores of {hardware['cpu']}:")
    gains = {}
    for part in suite.parts:
        points = differences(lines, part)
        if part != BASE and points:
            gains[part] = statistics.mean(points)
            print(f"  {part:<17} {verdict(points, lines[0]['num_pictures'])}")
    best = max(gains, key=lambda part: gains[part])
    paired = {line["seed"] for line in lines if line["part"] == best}
    base = statistics.mean(100 * line["accuracy"] for line in lines if line["part"] == BASE and line["seed"] in paired)
    print(f"accuracy with {best} over the base's, {len(differences(lines, best))} seeds:")
    print(f"ratio={(base + gains[best]) / base:.3f}")


if __name__ == "__main__":
    main()
