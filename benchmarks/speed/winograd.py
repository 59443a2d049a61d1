"""Training steps with Winograd's convolutions, as `fit` takes them on a CPU in float32, against direct ones.

    python -m benchmarks.speed.winograd
    python -m benchmarks.speed.winograd --json benchmarks/results/winograd.json

Steps (forward, backward, SGD with momentum) of one model, channels_last, on random images, with either in turn. The
last line is the images/s with Winograd's over those without of SmallNet at 32 pixels.
"""

import argparse
import statistics
from typing import Any

import torch

from benchmarks.hardware import hardware_name, results_file
from benchmarks.speed.models import NUM_CLASSES, NUM_WARM_UP, trainer_of
from benchmarks.speed.results import spread, write_results
from cifar_lightning.data.memory import keep_freed_memory
from cifar_lightning.models.cpu_convolutions import faster_convolutions
from cifar_lightning.models.registry import build_model

# Name, image size, batch: those of the configs, SmallNet last.
CASES = [("resnet18", 32, 128), ("speednet", 24, 1000), ("speednet", 28, 1000), ("speednet", 32, 1000)]
CASES += [("smallnet", 24, 128), ("smallnet", 28, 128), ("smallnet", 32, 128)]


def compare(name: str, image_size: int, batch_size: int, num_steps: int) -> dict[str, Any]:
    """Return the images/s of a model with each kind of convolution, and the ratio of each pair of steps."""
    torch.manual_seed(0)
    model = build_model(name, NUM_CLASSES, image_size)
    step = trainer_of(model, image_size, batch_size, torch.device("cpu"))
    seconds: dict[str, list[float]] = {"winograd": [], "direct": []}
    for count in range(NUM_WARM_UP + num_steps):
        with faster_convolutions(model):
            winograd_s = step()
        direct_s = step()
        if count >= NUM_WARM_UP:
            seconds["winograd"].append(winograd_s)
            seconds["direct"].append(direct_s)
    ratios = [direct / winograd for winograd, direct in zip(*seconds.values(), strict=True)]
    images_per_s = {kind: batch_size / statistics.median(own) for kind, own in seconds.items()}
    return {
        "model": name,
        "image_size": image_size,
        "batch_size": batch_size,
        "images_per_s": images_per_s,
        "ratios": ratios,
    }


def main() -> None:
    """Measure and print; the last line is `ratio=X`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="timed steps with each (default 7), after 2 to warm up")
    parser.add_argument("--json", type=results_file, help="write the figures to this file")
    args = parser.parse_args()
    keep_freed_memory()  # as `fit`
    rows = []
    for case in CASES:
        rows.append(compare(*case, args.steps))
        rates = ", ".join(f"{rate:,.0f} images/s {kind}" for kind, rate in rows[-1]["images_per_s"].items())
        name, image_size, batch_size = case
        what = f"{name}, {image_size} pixels, batch {batch_size}, {args.steps} steps, {hardware_name()}"
        print(f"{what}: {rates}; {spread(rows[-1]['ratios'], 2)} times as fast", flush=True)
    write_results(args.json, rows=rows)
    print(f"ratio={statistics.median(rows[-1]['ratios']):.3f}")


if __name__ == "__main__":
    main()
