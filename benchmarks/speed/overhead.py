"""Host time that `Trainer.fit` adds to a step of a hand-written loop with the same loader, model and optimizer.

    python -m benchmarks.speed.overhead                        a one-layer model, then SmallNet at batch size 128
    python -m benchmarks.speed.overhead --quick                the one-layer model alone, 1 round
    python -m benchmarks.speed.overhead --config speedrun94    the one-layer model with a config's optimizer, schedule
                                                               and flags, compared with barebones
    python -m benchmarks.speed.overhead --against DIR          `fit` of another checkout of this project, in turn

Four programs run in turn, several rounds, in one process: a hand-written loop; plain Lightning (progress bar, CSV
logger, `self.log(prog_bar=True)`, its checkpoint callback); Lightning's barebones; our ordinary `fit` (progress bar,
TensorBoard, metrics, checkpoints). The time of a step is the mean time between two forward passes. Times are compared
within a round. The last line is what `fit` adds over what plain Lightning adds (--quick) or barebones adds (--config),
or the time of `fit` over the hand-written loop for SmallNet; with --against, our step time over theirs.
"""

import argparse
import functools
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from benchmarks import CONFIGS
from benchmarks.hardware import hardware_name, results_file
from benchmarks.speed import paired
from benchmarks.speed.one_layer import SMALL_BATCH, Clocked, one_layer, step_us
from benchmarks.speed.results import spread, write_results
from cifar_lightning import ImageDataModule, SmallNet
from cifar_lightning.cli.flags import table
from cifar_lightning.cli.main import run_command
from cifar_lightning.data.loaders import ImageLoader
from cifar_lightning.errors import UserError
from cifar_lightning.models.cpu_convolutions import use_faster_convolutions
from cifar_lightning.models.registry import MODELS
from cifar_lightning.optim.optimizers import OptimizerSettings, build_optimizer
from cifar_lightning.optim.schedules import ScheduleSettings, make_schedule

LR = 1e-3
# Lightning sets it to 1; without a GPU torch's optimizers then look for the driver in every step.
NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"


def small_net(num_classes: int, image_size: int) -> nn.Module:
    """Return SmallNet with a clock, and with the convolutions of `fit`: the difference is what a step adds."""
    model = Clocked(SmallNet(num_classes)).to(memory_format=torch.channels_last)
    use_faster_convolutions(model)
    return model


def register(**models: Callable[[int, int], nn.Module]) -> None:
    """Add models to those of `--model.name`."""
    MODELS.update(models)
    table()["model.name"]["choices"] += models


@dataclass(frozen=True)
class Training:
    """The settings that all four programs train with.

    Attributes:
        optimizer: Settings of the optimizer.
        schedule: Makes the schedule of an optimizer for a number of steps.
        flags: The flags of `fit` for the same.
    """

    optimizer: OptimizerSettings
    schedule: Callable[[torch.optim.Optimizer, int], LRScheduler]
    flags: list[str]


def default_training() -> Training:
    """Return AdamW with OneCycle."""
    optimizer = OptimizerSettings(
        name="adamw",
        lr=LR,
        sgd_lr=0.1,
        head_lr=None,
        momentum=0.9,
        sgd_momentum=0.9,
        weight_decay=0.05,
        sgd_weight_decay=0.0,
    )
    return Training(
        optimizer,
        lambda optimizer, steps: make_schedule(
            optimizer, ScheduleSettings("one_cycle", pct_start=None, stem_train_fraction=1.0), total_steps=steps
        ),
        [f"--lr={LR}", "--trainer.precision=32-true"],
    )


def config_training(recipe: str) -> Training:
    """Return the settings of a config with a linear schedule; image sizes, TTA and precision stay the defaults."""
    path = CONFIGS / f"{recipe}.yaml"
    model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    names = ("lr", "sgd_lr", "head_lr", "momentum", "sgd_momentum", "sgd_weight_decay")
    optimizer = OptimizerSettings(model["optimizer"], weight_decay=0.0, **{name: float(model[name]) for name in names})
    plain = ["--data.train_sizes=[32]", "--model.tta=none", "--trainer.precision=32-true", "--model.model_kwargs=null"]
    plain += ["--model.stem_train_fraction=1.0"]  # one layer has no stem
    return Training(
        optimizer,
        lambda optimizer, steps: make_schedule(
            optimizer, ScheduleSettings("linear", pct_start=None, stem_train_fraction=1.0), total_steps=steps
        ),
        [f"--config={path}", *plain],
    )


def hand_loop(training: Training, name: str, batch_size: int) -> None:
    """Train one epoch without Lightning."""
    os.environ[NVML_CHECK] = "0"  # as in a process without Lightning
    data = ImageDataModule("synthetic", batch_size=batch_size)
    loader = data.train_dataloader()
    model = MODELS[name](10, 32)
    optimizer = build_optimizer(model, training.optimizer)
    schedule = training.schedule(optimizer, len(loader))
    model.train()
    for images, targets in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), targets, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        schedule.step()


class PlainModule(pl.LightningModule):
    """A LightningModule as most projects write it."""

    def __init__(self, training: Training, name: str, total_steps: int) -> None:
        super().__init__()
        self.training_settings, self.model, self.total_steps = training, MODELS[name](10, 32), total_steps

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return and log the loss."""
        images, targets = batch
        loss = F.cross_entropy(self.model(images), targets, label_smoothing=0.1)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        """Return the same optimizer and schedule as the others."""
        optimizer = build_optimizer(self.model, self.training_settings.optimizer)
        schedule = self.training_settings.schedule(optimizer, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TrainingData(pl.LightningDataModule):
    """Our training loader alone, so that plain Lightning is not slowed down by another DataLoader."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.inner = ImageDataModule("synthetic", batch_size=batch_size)

    def train_dataloader(self) -> ImageLoader:
        """Return our training loader."""
        return self.inner.train_dataloader()


def plain_lightning(training: Training, name: str, batch_size: int) -> None:
    """Train one epoch with Lightning's defaults."""
    os.environ[NVML_CHECK] = "1"  # as importing Lightning leaves it
    data = TrainingData(batch_size)
    module = PlainModule(training, name, len(data.train_dataloader()))
    pl.Trainer(max_epochs=1, accelerator="cpu", logger=CSVLogger("logs")).fit(module, data)


def barebones(training: Training, name: str, batch_size: int) -> None:
    """Train one epoch with `barebones=True`, which switches off all that Lightning can switch off."""
    os.environ[NVML_CHECK] = "1"  # as importing Lightning leaves it
    data = TrainingData(batch_size)
    module = PlainModule(training, name, len(data.train_dataloader()))
    pl.Trainer(max_epochs=1, accelerator="cpu", barebones=True).fit(module, data)


def our_fit(training: Training, name: str, batch_size: int) -> None:
    """Train one epoch with the ordinary `fit` command."""
    flags = {"--data.dataset": "synthetic", "--batch_size": batch_size, "--model.name": name, "--epochs": 1}
    flags_given = [*training.flags, *(f"{flag}={value}" for flag, value in flags.items())]
    run_command(["fit", "--trainer.accelerator=cpu", *flags_given])


def compare(ways: dict, name: str, batch_size: int, rounds: int) -> dict[str, list[float]]:
    """Run all programs in turn, `rounds` times; return the microseconds a step of each, round by round."""
    times: dict[str, list[float]] = {label: [] for label in ways}
    for _ in range(rounds):
        for label, way in ways.items():
            times[label].append(step_us(functools.partial(way, name, batch_size)))
    return times


def compare_checkouts(checkout: Path, rounds: int) -> None:
    """Compare the `fit` of another checkout with ours; the last line is `ratio=X`."""
    try:
        ratios = paired.ratios_to(checkout, "one_layer.py", [], rounds)
    except UserError as error:
        sys.exit(f"error: {error}")
    paired.report(f"time of a step of `fit`, one-layer model, batch size {SMALL_BATCH}", ratios, hardware_name())


def main() -> None:
    """Measure and print; the last line is `ratio=X`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--quick", action="store_true", help="one round of the one-layer model alone")
    parser.add_argument("--config", help="train the one-layer model with this config, such as speedrun94")
    parser.add_argument("--json", type=results_file, help="write all results to this file")
    paired.add_argument(parser)
    args = parser.parse_args()
    if args.against:
        compare_checkouts(args.against, args.rounds)
        return
    register(one_layer=one_layer, clocked_smallnet=small_net)
    rounds = 1 if args.quick else args.rounds
    training = config_training(args.config) if args.config else default_training()
    ways = {
        label: functools.partial(way, training)
        for label, way in {
            "hand loop": hand_loop,
            "plain Lightning": plain_lightning,
            "barebones": barebones,
            "fit": our_fit,
        }.items()
    }
    small = compare(ways, "one_layer", SMALL_BATCH, rounds)
    print(f"one-layer model, batch {SMALL_BATCH}, {rounds} rounds of 1,125 steps, microseconds a step, CPU:")
    for label, times in small.items():
        print(f"  {label:<16} {statistics.median(times):7.0f}  ({min(times):.0f} to {max(times):.0f})")
    rounds_us = zip(small["hand loop"], small["plain Lightning"], small["fit"], strict=True)
    ratios = [(ours - hand) / (plain - hand) for hand, plain, ours in rounds_us]
    print(f"added by fit over added by plain Lightning: {spread(ratios, 2)}")
    results: dict[str, Any] = {"one_layer_us": small, "added_over_plain": ratios}
    ratio = statistics.median(ratios)
    if args.config:
        rounds_us = zip(small["hand loop"], small["barebones"], small["fit"], strict=True)
        ratios = [(ours - hand) / (bare - hand) for hand, bare, ours in rounds_us]
        ratio = statistics.median(ratios)
        results |= {"recipe": args.config, "added_over_barebones": ratios}
        print(f"added by fit over added by barebones, CPU, {rounds} rounds ({min(ratios):.2f} to {max(ratios):.2f}):")
    elif not args.quick:
        pair = {label: ways[label] for label in ("hand loop", "fit")}
        large = compare(pair, "clocked_smallnet", 128, rounds)
        ratios = [o / h for h, o in zip(large["hand loop"], large["fit"], strict=True)]
        ratio = statistics.median(ratios)
        results |= {"smallnet_us": large, "fit_over_hand_loop": ratios}
        print(
            f"SmallNet, batch 128, CPU, fit over hand loop, {rounds} rounds ({min(ratios):.3f} to {max(ratios):.3f}):"
        )
    write_results(args.json, **results)
    print(f"ratio={ratio:.3f}")


if __name__ == "__main__":
    main()
