"""Arguments of `lightning.Trainer`: what each does in a run, its limits, and the values that are refused, with reasons.

`python -m cifar_lightning.cli.trainer_arguments` generates the table of docs/trainer-arguments.md; tests hold it equal
and fail for an argument of Lightning's that has no entry.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.plugins import CheckpointIO, Precision
from pydantic import Field

from cifar_lightning.cli.trainer_objects import check_kinds, class_of, objects_in
from cifar_lightning.errors import UserError, remark
from cifar_lightning.formatting import clipped, command_line
from cifar_lightning.settings.limits import Count, check_setting, limits_of
from cifar_lightning.training.precision import is_on_cuda

PAGE = Path("docs/trainer-arguments.md")
_HEAD = """# Trainer arguments

Every argument of `lightning.Trainer`; `max_epochs` is the flag `--trainer.max_epochs`. One that works has a test of
what it does, or, where Lightning alone carries it out, of the value that reaches the Trainer; only `sync_batchnorm` on
several GPUs has none. A value that is refused ends the command with exit code 2 and the reason, before anything is
written.

The loaders are not PyTorch `DataLoader` instances: they implement `overfit_batches` and the distributed sampling
themselves. This page is generated: `python -m cifar_lightning.cli.trainer_arguments`.
"""
_MOST_DEVICES = 1024  # of one machine; a typo would start that many processes
_LAUNCHERS = ("MASTER_ADDR", "SLURM_JOB_ID", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE")  # set by what starts processes
_WHOLE = "a value above 1 is a number of batches; give a whole number, such as 2"
_DDP = ("ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")
_EPOCHS = "1 or more, or -1 with --trainer.max_steps"  # the schedule needs an end
_FROM_0 = Annotated[int, Field(ge=0)]
_OR_ALL = Annotated[int, Field(ge=-1)]
_SOME = Annotated[float, Field(gt=0, description="a fraction of the batches to 1.0, or a number of batches")]
_MAYBE = Annotated[float, Field(ge=0, description="0 (none), a fraction of the batches to 1.0, or a number of batches")]


@dataclass(frozen=True)
class Argument:
    """An argument of the Trainer.

    Attributes:
        does: What it does in a run; empty where only the default is taken.
        limits: Annotation with the bounds of a number.
        refused: Reason -> whether a value is refused, given the Trainer's arguments.
    """

    does: str = ""
    limits: Any = None
    refused: Mapping[str, Callable[[Any, Namespace], bool]] = field(default_factory=dict)


def _is_float_above_1(value: float, _: Namespace) -> bool:
    return isinstance(value, float) and value > 1  # Lightning multiplies the batches by it, also by 2.0


def _batches(does: str, limits: Any = _SOME) -> Argument:
    return Argument(does, limits, {_WHOLE: _is_float_above_1})


def _is_unknown_strategy(value: Any, _: Namespace) -> bool:
    if isinstance(value, str):
        return value.lower() not in ("auto", "single_device", *_DDP)
    name = str(value.get("class_path", "")).rpartition(".")[2]
    forks = value.get("init_args.start_method") not in (None, "popen")
    return name != "SingleDeviceStrategy" and (name != "DDPStrategy" or forks)


def _is_duration(value: Any) -> bool:
    if isinstance(value, str):
        parts = re.fullmatch(r"(\d{1,5}):(\d{1,2}):(\d{1,2}):(\d{1,2})", value)
        return parts is not None and any(map(int, parts.groups()))
    return value > timedelta(0) if isinstance(value, timedelta) else any(dict(value).values())


def _num_devices(trainer: Namespace) -> int:
    """Return how many devices are asked for by number or list; 1 for auto, all GPUs for -1."""
    devices = str(trainer.devices)
    if devices == "-1":
        return torch.cuda.device_count() if is_on_cuda(trainer) else 1
    return int(devices) if devices.isdecimal() else len(re.findall(r"\d+", devices)) or 1


def _has(kind: type) -> Callable[[Any, Namespace], bool]:
    """Return a check of whether a value holds a class of a kind, given by `class_path`."""
    return lambda value, _: any(
        isinstance(given := class_of(node), type) and issubclass(given, kind) for node in objects_in(value)
    )


ARGUMENTS: dict[str, Argument] = {
    "accelerator": Argument(
        "`auto` (a GPU if there is one), `cpu`, `gpu`, `cuda` or `mps`",
        refused={"one of auto, cpu, gpu, cuda, mps": lambda v, _: v not in ("auto", "cpu", "gpu", "cuda", "mps")},
    ),
    "strategy": Argument(
        "`auto`, `single_device`, `ddp`, or `DDPStrategy` with its arguments by `class_path`",
        refused={
            f"one of auto, single_device, {', '.join(_DDP)}; others fork this process or divide the model": (
                _is_unknown_strategy
            )
        },
    ),
    "devices": Argument(
        "number or list of devices, or `auto`; `fit` in a notebook takes one",
        refused={
            "auto, a number of devices, or a list such as [0, 1]": (
                lambda value, _: not re.fullmatch(r"auto|\[?\s*-?\d+(\s*,\s*\d+)*\s*,?\]?", str(value))
            ),
            f"at most {_MOST_DEVICES} on one machine": (
                lambda value, _: str(value).isdecimal() and int(value) > _MOST_DEVICES
            ),
            "--trainer.strategy single_device uses one device; give ddp": (
                lambda _, trainer: trainer.strategy == "single_device" and _num_devices(trainer) > 1
            ),
        },
    ),
    "num_nodes": Argument(
        "number of machines, which torchrun or SLURM start",
        Count,
        {
            "nothing started the processes of the other machines; give 1, or start with torchrun or SLURM": (
                lambda value, trainer: value > 1 and not trainer.plugins and not {*_LAUNCHERS} & os.environ.keys()
            )
        },
    ),
    "precision": Argument(
        "`16-mixed` on CUDA, `bf16-mixed` in one process on a CPU that is faster in it, else `32-true`, also on "
        "Apple's GPU, where `64-true` is refused; what else the device does not support is replaced, with a remark",
        refused={
            "transformer-engine replaces layers, whose weights no other command loads; give 16-mixed or bf16-mixed": (
                lambda value, _: str(value).startswith("transformer-engine")
            )
        },
    ),
    "logger": Argument("TensorBoard in the run; `false` for none, or loggers by `class_path`"),
    "callbacks": Argument("callbacks by `class_path`, next to those of the run"),
    "fast_dev_run": Argument("trains, validates and tests 1 or N batches, and writes nothing", _FROM_0),
    "max_epochs": Argument(
        "epochs of training, as `--epochs`; -1: no limit but `max_steps`",
        Annotated[int, Field(ge=-1, description=_EPOCHS)],
        {_EPOCHS: (lambda value, trainer: value == 0 or (value == -1 and trainer.max_steps == -1))},
    ),
    "min_epochs": Argument(
        "no early stop before",
        _FROM_0,
        {"must not be more than --epochs": lambda value, trainer: 0 < (trainer.max_epochs or 0) < value},
    ),
    "max_steps": Argument(
        "ends training after this many steps, if `--epochs` does not before",
        _OR_ALL,
        {
            "1 or more, or -1 for as many as the epochs have": lambda value, _: value == 0,
            "--epochs null needs a number of steps, as the schedule needs an end": (
                lambda value, trainer: value == -1 and trainer.max_epochs is None
            ),
        },
    ),
    "min_steps": Argument(
        "no early stop before; at most the steps of the run",
        _FROM_0,
        {"must not be more than --trainer.max_steps": lambda value, trainer: 0 < trainer.max_steps < value},
    ),
    "max_time": Argument(
        "ends training after this time",
        refused={"days:hours:minutes:seconds above 0": lambda v, _: not _is_duration(v)},
    ),
    "limit_train_batches": _batches("batches of an epoch"),
    "limit_val_batches": _batches("batches of a validation; 0 for none", _MAYBE),
    "limit_test_batches": _batches("batches of the test"),
    "limit_predict_batches": _batches("batches of `predict`"),
    "overfit_batches": Argument(
        "the same training batches each epoch, their augmentation drawn each time; as many for validation",
        _MAYBE,
        {
            _WHOLE: _is_float_above_1,
            "overfit_batches also limits train and val; leave limit_train_batches and limit_val_batches out": (
                lambda v, trainer: v > 0 and (trainer.limit_train_batches, trainer.limit_val_batches) != (None, None)
            ),
        },
    ),
    "val_check_interval": Argument(
        "validates after a fraction of an epoch or a number of batches",
        Annotated[float, Field(gt=0, description="a fraction of an epoch, such as 0.5, or a number of batches")],
        {_WHOLE: _is_float_above_1},
    ),
    "check_val_every_n_epoch": Argument(
        "validates every N epochs; null: by `val_check_interval` across epochs",
        Count,
        {
            "must not be more than --epochs, or nothing would be validated": lambda value, t: (
                0 < (t.max_epochs or 0) < value
            )
        },
    ),
    "num_sanity_val_steps": Argument("validation batches before training, all for -1; changes no result", _OR_ALL),
    "log_every_n_steps": Argument("steps between the points of loss and lr in TensorBoard; 0 for none", _FROM_0),
    "enable_checkpointing": Argument("`false`: no checkpoint, the last weights are tested"),
    "enable_progress_bar": Argument("`false`: no progress"),
    "enable_model_summary": Argument("`true` prints the layers"),
    "accumulate_grad_batches": Argument("batches whose gradients make a step", Count),
    "gradient_clip_val": Argument(
        "clips gradients", Annotated[float, Field(ge=0, description="0 (off) or more, such as 1")]
    ),
    "gradient_clip_algorithm": Argument(
        "`norm` or `value`",
        refused={
            "norm or value": lambda value, _: value.lower() not in ("norm", "value"),
            "nothing is clipped without --trainer.gradient_clip_val; give both or none": lambda _, trainer: (
                not trainer.gradient_clip_val
            ),
        },
    ),
    "deterministic": Argument("only deterministic operations; `warn` names the others"),
    "benchmark": Argument("cuDNN chooses algorithms by time; on unless `deterministic`"),
    "inference_mode": Argument("`false`: evaluates under `torch.no_grad`"),
    "use_distributed_sampler": Argument(
        refused={"the loaders themselves deal each batch to the processes; leave it out": lambda value, _: not value}
    ),
    "profiler": Argument(
        "`simple`, `advanced`, `pytorch`, or a profiler by `class_path`; its report is printed",
        refused={
            "simple, advanced, pytorch, or a class_path": (
                lambda v, _: isinstance(v, str) and v.lower() not in ("simple", "advanced", "pytorch")
            )
        },
    ),
    "detect_anomaly": Argument("raises at the operation whose gradient is NaN"),
    "barebones": Argument(
        refused={
            "a run keeps logs and checkpoints; --trainer.logger false leaves TensorBoard out": lambda value, _: value
        }
    ),
    "plugins": Argument(
        "cluster environments by `class_path`",
        refused={
            "a precision plugin would not agree with --trainer.precision, which every run has; give that": (
                _has(Precision)
            ),
            "only DurableCheckpointIO writes checkpoints, durably; leave it out": _has(CheckpointIO),
        },
    ),
    "sync_batchnorm": Argument(
        "BatchNorm over the images of all GPUs",
        refused={"SyncBatchNorm needs GPUs; leave it out": lambda value, trainer: value and not is_on_cuda(trainer)},
    ),
    "reload_dataloaders_every_n_epochs": Argument("makes the loaders again; changes no result", _FROM_0),
    "default_root_dir": Argument(refused={"a run's folder is --run_dir": lambda value, _: True}),
    "enable_autolog_hparams": Argument("`false`: no hyperparameters in TensorBoard"),
    "model_registry": Argument(refused={"nothing is uploaded; leave it out": lambda value, _: True}),
}

# Not read by validate, test and predict, whose config is that of a run, which may be from another machine.
_OF_FIT = ["max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches", "overfit_batches"]
_OF_FIT += ["check_val_every_n_epoch", "gradient_clip_algorithm", "sync_batchnorm"]
LIMITS = {f"trainer.{name}": argument.limits for name, argument in ARGUMENTS.items() if argument.limits}


def check_trainer(command: str, trainer: Namespace) -> None:
    """Refuse values of the Trainer's arguments that a command reads, alone and together, each with the reason."""
    for name, argument in ARGUMENTS.items():
        if command != "fit" and name in _OF_FIT:
            continue
        value = trainer.get(name)
        check_setting(f"trainer.{name}", argument.limits, value)
        for reason, is_refused in argument.refused.items():
            if value is not None and is_refused(value, trainer):
                flag = "epochs" if name == "max_epochs" else f"trainer.{name}"
                raise UserError(f"--{flag} {clipped(str(value))}: {reason}.")
    if command == "fit":
        check_kinds(map(class_of, objects_in(trainer.get("callbacks"))))


def settle_devices(command: str, trainer: Namespace) -> None:
    """Use one device in a notebook or an interactive Python, where Lightning would fork this process for several.

    It takes one by itself where the devices are `auto`. An evaluation, whose devices are those of a run, does likewise.
    DDP, which a run may have been trained with, is refused by Lightning there even for one device.

    Raises:
        UserError: `fit` is given several devices.
    """
    if not (hasattr(sys, "ps1") or sys.flags.interactive):
        return
    is_several, in_terminal = _num_devices(trainer) > 1, f"{command_line('fit')} in a terminal"
    if "ddp" in str(trainer.strategy).lower():
        trainer.strategy = "auto"
    if is_several and command != "fit":
        remark("remark: this interactive Python or notebook evaluates on one device.")
        trainer.devices = 1
    elif is_several:
        raise UserError(
            f"--trainer.devices {clipped(str(trainer.devices))}: an interactive Python or a notebook trains on one "
            f"device; give --trainer.devices 1, or start {in_terminal}."
        )
    elif (command, trainer.devices) == ("fit", "auto") and is_on_cuda(trainer) and torch.cuda.device_count() > 1:
        idle = f"trains on 1 of {torch.cuda.device_count()} GPUs; {in_terminal} on all"
        remark(f"remark: this interactive Python or notebook {idle}.")


def page_text() -> str:
    """Return the content of the docs page."""
    rows = ["| Argument | Verdict | In a run | Allowed, or refused because |", "| --- | --- | --- | --- |"]
    for name, argument in ARGUMENTS.items():
        reasons = "; ".join(filter(None, dict.fromkeys((limits_of(argument.limits)[1], *argument.refused))))
        rows.append(f"| `{name}` | {'works' if argument.does else 'refused'} | {argument.does} | {reasons} |")
    return f"{_HEAD}\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page_text(), encoding="utf-8")
