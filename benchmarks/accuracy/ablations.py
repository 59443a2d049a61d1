"""Ablations: the same short run with one setting changed, paired by seed.

    python -m benchmarks.accuracy.ablations --data ROOT                  SmallNet on 5,000 images, every setting, seed 0
    python -m benchmarks.accuracy.ablations --data ROOT --seeds 1,2 --only ema,cutmix
    python -m benchmarks.accuracy.ablations --data ROOT --suite stems    ResNet-18 with a stem for small images

Accuracy is measured on validation images, so that the test set stays for the runs that are reported. The validation
split is large, because differences are about 1 point. With --json runs are added to the file, and runs that it already
holds are skipped. The last line is the best setting's accuracy over the base's.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks import ROOT, execute
from benchmarks.hardware import hardware_name, results_file
from cifar_lightning.metrics.significance import mean_interval

BASE = "base"
PROGRAM = [sys.executable, str(ROOT / "train.py")]


@dataclass(frozen=True)
class Suite:
    """A base run and the settings that are compared with it.

    Attributes:
        about: Description of the base.
        flags: Flags of every run.
        settings: Name of a setting -> its flags, added to those of the base.
        tta: Names of the settings that change the evaluation alone: `validate` gets their flags, on the base's run.
    """

    about: str
    flags: list[str]
    settings: Mapping[str, list[str]]
    tta: tuple[str, ...] = ()


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
            "mirror TTA": ["--model.tta=mirror"],
            "six-view TTA": ["--model.tta=six"],
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
            "half the lr": ["--lr=0.025"],
            "a quarter of the lr": ["--lr=0.0125"],
            "sgd": ["--model.optimizer=sgd", "--lr=0.1", "--model.weight_decay=0.0005"],
            "adamw": ["--model.optimizer=adamw", "--lr=0.003"],
        },
        ("mirror TTA", "six-view TTA"),
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


def measure(suite: Suite, setting: str, seed: int, data: str, run: Path) -> dict[str, Any]:
    """Train with a setting, or validate a copy of the base's run with it; return the results."""
    started_s = time.perf_counter()
    if setting in suite.tta:
        run = Path(shutil.copytree(run, run.with_name(setting)))
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        # A run keeps results of its own TTA alone.
        config["model"]["tta"] = suite.settings[setting][0].removeprefix("--model.tta=")
        (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        execute([*PROGRAM, "validate", str(run)])
    else:
        flags = [
            *suite.flags,
            *suite.settings[setting],
            "--data.dataset=folder",
            f"--data.root={data}",
            f"--run_dir={run}",
        ]
        flags += [f"--seed_everything={seed}", f"--data.seed={seed}", "--trainer.limit_test_batches=1"]
        execute([*PROGRAM, "fit", *flags])
    predictions = np.load(run / "predictions_val.npz")
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    return {
        "accuracy": float((predictions["logits"].argmax(1) == predictions["targets"]).mean()),
        "num_images": len(predictions["targets"]),
        "seconds": time.perf_counter() - started_s,
        "precision": environment["precision"],
        "commit": environment["commit"],
        "dirty": environment["dirty"],
    }


def differences(lines: list[dict[str, Any]], setting: str) -> list[float]:
    """Return the accuracy of a setting minus that of the base, in points, for each seed that both have."""
    by_seed = {
        name: {line["seed"]: 100 * line["accuracy"] for line in lines if line["setting"] == name}
        for name in (BASE, setting)
    }
    return [
        by_seed[setting][seed] - by_seed[BASE][seed] for seed in sorted(by_seed[BASE].keys() & by_seed[setting].keys())
    ]


def verdict(points: list[float], num_images: int) -> str:
    """Return the mean difference with its spread, and whether a t-test at 5 % tells it from 0."""
    mean = statistics.mean(points)
    if len(points) == 1:
        # Standard error over the images for independent predictions; one seed says nothing about the spread of seeds.
        chance = 200 * math.sqrt(2 * 0.2 * 0.8 / num_images)
        claim = "cannot tell" if abs(mean) < chance else "one seed only"
        return f"{mean:+.2f} points (n=1, no spread): {claim}"
    low, high = mean_interval(points)
    claim = "cannot tell" if low < 0 < high else "more than chance"
    return f"{mean:+.2f} points (± {statistics.stdev(points):.2f}, n={len(points)}): {claim}"


def main() -> None:
    """Measure and print; the last line is `ratio=X`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="training")
    parser.add_argument("--data", required=True, help="class folders of CIFAR-10")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--only", type=lambda text: text.split(","), help="these settings and the base")
    parser.add_argument("--precision", help="precision of all runs, such as bf16-mixed")
    parser.add_argument("--json", type=results_file, help="add the runs to this file")
    args = parser.parse_args()
    suite = SUITES[args.suite]
    unknown = sorted(set(args.only or ()) - (suite.settings.keys() - {BASE}))
    if unknown:
        parser.error(f"--only {unknown[0]}: of {args.suite} there are {', '.join(suite.settings)}")
    if args.precision:
        suite.flags.append(f"--trainer.precision={args.precision}")
    every = json.loads(args.json.read_text(encoding="utf-8")) if args.json and args.json.exists() else []
    lines = [line for line in every if (line["suite"], line["asked_precision"]) == (args.suite, args.precision)]
    wanted = [setting for setting in suite.settings if not args.only or setting == BASE or setting in args.only]
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for setting in wanted:
                is_there = any((line["setting"], line["seed"]) == (setting, seed) for line in lines)
                is_needed = setting == BASE and any(
                    name in wanted and not any((line["setting"], line["seed"]) == (name, seed) for line in lines)
                    for name in suite.tta
                )
                if is_there and not is_needed:
                    continue
                run = Path(folder) / (BASE if setting in suite.tta else setting)
                figures = measure(suite, setting, seed, args.data, run)
                if not is_there:
                    lines.append({"suite": args.suite, "setting": setting, "seed": seed, **figures})
                    lines[-1] |= {"asked_precision": args.precision, "hardware": hardware_name()}
                    every.append(lines[-1])
                print(
                    f"seed {seed}, {setting}: {100 * figures['accuracy']:.2f} % in {figures['seconds']:.0f} s",
                    flush=True,
                )
                if args.json:
                    args.json.write_text(json.dumps(every, indent=2) + "\n", encoding="utf-8")
    print(f"{suite.about}; difference to it, paired by seed, {hardware_name()}:")
    gains = {}
    for setting in suite.settings:
        points = differences(lines, setting)
        if setting != BASE and points:
            gains[setting] = statistics.mean(points)
            print(f"  {setting:<17} {verdict(points, lines[0]['num_images'])}")
    best = max(gains, key=lambda setting: gains[setting])
    paired = {line["seed"] for line in lines if line["setting"] == best}
    base = statistics.mean(
        100 * line["accuracy"] for line in lines if line["setting"] == BASE and line["seed"] in paired
    )
    print(f"accuracy with {best} over the base's, {len(differences(lines, best))} seeds:")
    print(f"ratio={(base + gains[best]) / base:.3f}")


if __name__ == "__main__":
    main()
