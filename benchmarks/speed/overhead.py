"""Host time a training step that `Trainer.fit` adds to a hand-written loop over the same loader, network and optimiser.

    python -m benchmarks.speed.overhead                        a one-layer model, then SmallNet at batch 128
    python -m benchmarks.speed.overhead --quick                the one-layer model alone, 1 round
    python -m benchmarks.speed.overhead --recipe speedrun94    the one-layer model with a config's optimizer, schedule
                                                               and flags, compared with barebones

Four ways of training run in turn, several rounds, in one process: a hand-written loop; plain Lightning (bar, CSV
logger, `self.log(prog_bar=True)`, its checkpoint callback); its barebones; our ordinary `fit` (bar, TensorBoard,
metrics, checkpoints). A step's time is the mean distance of two forward passes; figures are compared within a round.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from benchmarks import CONFIGS
from cifar_lightning import ImageDataModule, SmallNet
from cifar_lightning.cli.flags import table
from cifar_lightning.cli.main import run_command
from cifar_lightning.data.loaders import ImageLoader
from cifar_lightning.models.registry import MODELS
from cifar_lightning.optim.optimizers import OptimizerSettings, build_optimizer
from cifar_lightning.optim.schedules import ScheduleSettings, make_schedule
from cifar_lightning.runs.environment import describe_environment

SMALL_BATCH = 4  # 1,125 steps in an epoch of the synthetic set
LR = 1e-3
# Lightning sets it to 1; without a GPU torch's optimisers then look for the driver in every step.
NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"


class Clocked(nn.Module):
    """Notes the time of each training forward pass; the clock is of the class, since `fit` makes its own instance."""

    ticks_s: list[float] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's logits."""
        if self.training:
            Clocked.ticks_s.append(time.perf_counter())
        return self.model(images)


def one_layer(num_classes: int, image_size: int) -> nn.Module:
    """Return the smallest network there is: what is left of a step is overhead."""
    return Clocked(nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes)))


def small_net(num_classes: int, image_size: int) -> nn.Module:
    """Return SmallNet with a clock."""
    return Clocked(SmallNet(num_classes)).to(memory_format=torch.channels_last)


def register(**models: Callable[[int, int], nn.Module]) -> None:
    """Let `--model.name` take further networks."""
    MODELS.update(models)
    table()["model.name"]["choices"] += models


@dataclass(frozen=True)
class Splits:
    """What every way trains with.

    Attributes:
        optimizer: Settings of the optimizer.
        schedule: Makes the schedule of an optimiser for a number of steps.
        flags: Of `fit`, for the same.
    """

    optimizer: OptimizerSettings
    schedule: Callable[[torch.optim.Optimizer, int], LRScheduler]
    flags: list[str]


def usual_parts() -> Splits:
    """Return AdamW with OneCycle."""
    return Splits(
        OptimizerSettings("adamw", LR, 0.1, None, 0.9, 0.9, 0.05, 0.0),
        lambda optimizer, steps: make_schedule(optimizer, ScheduleSettings("one_cycle", None, 1.0), total_steps=steps),
        [f"--lr={LR}"],
    )


def recipe_parts(recipe: str) -> Splits:
    """Return what a recipe with a linear schedule trains with; sizes, views and precision are a plain run's."""
    path = CONFIGS / f"{recipe}.yaml"
    model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    names = ("lr", "sgd_lr", "head_lr", "momentum", "sgd_momentum", "sgd_weight_decay")
    optimizer = OptimizerSettings(model["optimizer"], weight_decay=0.0, **{name: model[name] for name in names})
    plain = ["--data.train_sizes=[32]", "--model.tta=none", "--trainer.precision=32-true", "--model.model_kwargs=null"]
    plain += ["--model.stem_train_fraction=1.0"]  # one layer has no stem
    return Splits(
        optimizer,
        lambda optimizer, steps: make_schedule(optimizer, ScheduleSettings("linear", None, 1.0), total_steps=steps),
        [f"--config={path}", *plain],
    )


def hand_loop(parts: Splits, name: str, batch_size: int) -> None:
    """Train one epoch as one would without Lightning."""
    os.environ[NVML_CHECK] = "0"  # as in a process without Lightning
    data = ImageDataModule("synthetic", batch_size=batch_size)
    loader = data.train_dataloader()
    model = MODELS[name](10, 32)
    optimizer = build_optimizer(model, parts.optimizer)
    schedule = parts.schedule(optimizer, len(loader))
    model.train()
    for images, targets in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), targets, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        schedule.step()


class PlainModule(pl.LightningModule):
    """What most projects write."""

    def __init__(self, parts: Splits, name: str, total_steps: int) -> None:
        super().__init__()
        self.parts, self.model, self.total_steps = parts, MODELS[name](10, 32), total_steps

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return and log the loss."""
        images, targets = batch
        loss = F.cross_entropy(self.model(images), targets, label_smoothing=0.1)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        """Return the same optimiser and schedule as the others."""
        optimizer = build_optimizer(self.model, self.parts.optimizer)
        schedule = self.parts.schedule(optimizer, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TrainingData(pl.LightningDataModule):
    """Our training loader without the rest: plain Lightning must not be charged for a slower DataLoader."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.inner = ImageDataModule("synthetic", batch_size=batch_size)

    def train_dataloader(self) -> ImageLoader:
        """Return our loader."""
        return self.inner.train_dataloader()


def plain_lightning(parts: Splits, name: str, batch_size: int) -> None:
    """Train one epoch with Lightning's defaults."""
    os.environ[NVML_CHECK] = "1"  # as importing Lightning leaves it
    data = TrainingData(batch_size)
    module = PlainModule(parts, name, len(data.train_dataloader()))
    pl.Trainer(max_epochs=1, accelerator="cpu", logger=CSVLogger("logs")).fit(module, data)


def barebones(parts: Splits, name: str, batch_size: int) -> None:
    """Train one epoch with everything that Lightning can switch off switched off."""
    os.environ[NVML_CHECK] = "1"  # as importing Lightning leaves it
    data = TrainingData(batch_size)
    module = PlainModule(parts, name, len(data.train_dataloader()))
    pl.Trainer(max_epochs=1, accelerator="cpu", barebones=True).fit(module, data)


def our_fit(parts: Splits, name: str, batch_size: int) -> None:
    """Train one epoch with the ordinary `fit` command."""
    flags = {"--data.dataset": "synthetic", "--batch_size": batch_size, "--model.name": name, "--epochs": 1}
    flags_given = [*parts.flags, *(f"{flag}={value}" for flag, value in flags.items())]
    run_command(["fit", "--trainer.accelerator=cpu", *flags_given])


def step_us(way: object, name: str, batch_size: int) -> float:
    """Return the mean microseconds between two forward passes of one epoch, the first fifth left out as warm-up."""
    Clocked.ticks_s.clear()
    with silence():
        way(name, batch_size)
    ticks = Clocked.ticks_s
    first = len(ticks) // 5
    return 1e6 * (ticks[-1] - ticks[first]) / (len(ticks) - 1 - first)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Send what the runs print to nowhere, and their files to a folder that is deleted."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        os.environ.pop("CIFAR_LIGHTNING_RUN_DIR", None)
        os.environ["FORCE_COLOR"] = "1"  # both bars are drawn, as on a terminal
        yield


def compare(ways: dict, name: str, batch_size: int, rounds: int) -> dict[str, list[float]]:
    """Run all ways in turn, `rounds` times; return each way's microseconds a step, round by round."""
    times: dict[str, list[float]] = {label: [] for label in ways}
    for _ in range(rounds):
        for label, way in ways.items():
            times[label].append(step_us(way, name, batch_size))
    return times


def main() -> None:
    """Measure and print; the last line is `ratio=X`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of every way (default 5)")
    parser.add_argument("--quick", action="store_true", help="one round of the one-layer network alone")
    parser.add_argument("--recipe", help="train the one-layer network as this recipe does, such as speedrun94")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    register(one_layer=one_layer, clocked_smallnet=small_net)
    rounds = 1 if args.quick else args.rounds
    parts = recipe_parts(args.recipe) if args.recipe else usual_parts()
    ways = {
        label: functools.partial(way, parts)
        for label, way in {
            "hand loop": hand_loop,
            "plain Lightning": plain_lightning,
            "barebones": barebones,
            "fit": our_fit,
        }.items()
    }
    small = compare(ways, "one_layer", SMALL_BATCH, rounds)
    print(f"one-layer network, batch {SMALL_BATCH}, {rounds} rounds of 1,125 steps, microseconds a step, CPU:")
    for label, times in small.items():
        print(f"  {label:<16} {statistics.median(times):7.0f}  ({min(times):.0f} to {max(times):.0f})")
    rounds_us = zip(small["hand loop"], small["plain Lightning"], small["fit"], strict=True)
    ratios = [(ours - hand) / (plain - hand) for hand, plain, ours in rounds_us]
    spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"added by fit over added by plain Lightning: {statistics.median(ratios):.2f} {spread}")
    environment = describe_environment()
    figures = {
        "commit": environment["commit"],
        "hardware": f"{environment['num_usable_cpus']} cores, {environment['cpu']}",
    }
    figures |= {"one_layer_us": small, "added_over_plain": ratios}
    ratio = statistics.median(ratios)
    if args.recipe:
        rounds_us = zip(small["hand loop"], small["barebones"], small["fit"], strict=True)
        ratios = [(ours - hand) / (bare - hand) for hand, bare, ours in rounds_us]
        ratio = statistics.median(ratios)
        figures |= {"recipe": args.recipe, "added_over_barebones": ratios}
        print(f"added by fit over added by barebones, CPU, {rounds} rounds ({min(ratios):.2f} to {max(ratios):.2f}):")
    elif not args.quick:
        pair = {label: ways[label] for label in ("hand loop", "fit")}
        large = compare(pair, "clocked_smallnet", 128, rounds)
        ratios = [o / h for h, o in zip(large["hand loop"], large["fit"], strict=True)]
        ratio = statistics.median(ratios)
        figures |= {"smallnet_us": large, "fit_over_hand_loop": ratios}
        print(
            f"SmallNet, batch 128, CPU, fit over hand loop, {rounds} rounds ({min(ratios):.3f} to {max(ratios):.3f}):"
        )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"ratio={ratio:.3f}")


if __name__ == "__main__":
    main()
