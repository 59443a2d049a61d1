"""Cost of each model on small images: parameters, multiply-adds, resolution of the last feature map, images/s.

    python -m benchmarks.speed.models                              every model that has a name, at 32 pixels
    python -m benchmarks.speed.models smallnet timm/resnet26d      these alone
    python -m benchmarks.speed.models --json benchmarks/results/models.json

Multiply-adds are those of convolutions and matrix products for one image, counted by torch from shapes. The map is
the output of the last convolution (of a vision transformer: its patches). Images/s are of training steps (forward,
backward, SGD with momentum) in float32 on random images on the device, channels_last as in `fit`; the models take their
steps in turn, and in parentheses are the slowest and the fastest step. The last line is the images/s of resnet18 over
those of smallnet, the median over pairs of steps; without both, of the last named model over the first.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.hardware import results_file
from benchmarks.speed.results import spread, write_results
from cifar_lightning.models.cpu_convolutions import use_faster_convolutions
from cifar_lightning.models.registry import MODELS, build_model

NUM_CLASSES = 10
NUM_WARM_UP = 2  # steps; cuDNN chooses its algorithms in the first


def costs(model: nn.Module, image_size: int) -> dict[str, Any]:
    """Return parameters, multiply-adds for an image and the map before pooling as [rows, columns]."""
    shapes = copy.deepcopy(model).to("meta").eval()
    maps: list[list[int]] = []

    def note(layer: nn.Module, taken: tuple[Tensor], given: Tensor) -> None:
        if taken[0].shape[2:].numel() > 1:  # else a layer over pooled features
            maps.append(list(given.shape[2:]))

    for layer in shapes.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(note)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shapes(torch.empty(1, 3, image_size, image_size, device="meta"))
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "multiply_adds": counter.get_total_flops() // 2,
        "map": maps[-1] if maps else [1, 1],
    }


def trainer_of(model: nn.Module, image_size: int, batch_size: int, device: torch.device) -> Callable[[], float]:
    """Return a function that trains the model for a step and returns its seconds."""
    model = model.to(device, memory_format=torch.channels_last).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.randint(NUM_CLASSES, (batch_size,), device=device)

    def step() -> float:
        began = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    side = "x".join(map(str, row["map"]))
    range_of_steps = f"({row['slowest']:,.1f} to {row['fastest']:,.1f})"
    return (
        f"{row['name']:<22} {row['parameters'] / 1e6:8.2f} M {row['multiply_adds'] / 1e9:9.3f} G {side:>7} "
        f"{row['images_per_s']:10,.1f}  {range_of_steps}"
    )


def main() -> None:
    """Measure and print; the last line is `ratio=X`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models; by default all that have a name")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32, help="images a step (default 32)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default 5), after 2 to warm up")
    parser.add_argument("--json", type=results_file, help="write all results to this file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{args.image_size} pixels, {NUM_CLASSES} classes, batch {args.batch}, median of {args.steps} steps, {where}:"
    )
    print(f"{'model':<22} {'parameters':>10} {'mult.-adds':>11} {'map':>7} {'images/s':>10}")
    names = args.names or list(MODELS)
    rows: dict[str, dict[str, Any]] = {}
    steps, times_s = {}, {}
    for name in names:
        torch.manual_seed(0)
        model = build_model(name, NUM_CLASSES, args.image_size)
        if device.type == "cpu":
            use_faster_convolutions(model)  # as in `fit`
        rows[name] = {"name": name, **costs(model, args.image_size)}
        steps[name], times_s[name] = trainer_of(model, args.image_size, args.batch, device), list[float]()
    for _ in range(NUM_WARM_UP + args.steps):  # a step of each in turn: what disturbs the machine disturbs all alike
        for name in names:
            times_s[name].append(steps[name]())
    for name in names:
        del times_s[name][:NUM_WARM_UP]
        for what, choose in (("images_per_s", statistics.median), ("slowest", max), ("fastest", min)):
            rows[name][what] = args.batch / choose(times_s[name])
        print(line(rows[name]))
    one, other = ("resnet18", "smallnet") if {"resnet18", "smallnet"} <= rows.keys() else (names[-1], names[0])
    of_steps = [other_s / one_s for one_s, other_s in zip(times_s[one], times_s[other], strict=True)]
    ratio = statistics.median(of_steps)
    write_results(
        args.json,
        device=where,
        image_size=args.image_size,
        batch_size=args.batch,
        num_steps=args.steps,
        models=list(rows.values()),
        over=[one, other],
        ratio=ratio,
    )
    what = f"Images/s of {one} over {other}, batch {args.batch}, {args.image_size} pixels, {args.steps} steps, {where}"
    print(f"{what}: {spread(of_steps, 3)}")
    print(f"ratio={ratio:.3f}")


if __name__ == "__main__":
    main()
