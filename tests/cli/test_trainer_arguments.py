"""Every argument of the Trainer works, as tested here, or is refused with the reason."""

import functools
import inspect
import logging
import os
import sys
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.environments import LightningEnvironment
from program import REPO, TINY

from cifar_lightning.cli.lightning_cli import TrainingCLI
from cifar_lightning.cli.main import run_command
from cifar_lightning.cli.parser import check_arguments
from cifar_lightning.cli.trainer_arguments import ARGUMENTS, PAGE, page_text, settle_devices
from cifar_lightning.errors import UserError
from cifar_lightning.training.quiet_lightning import quiet

SMALL = [*TINY, "--data.limit", "500", "--batch_size", "100", "--data.eval_batch_size", "20", "--run_dir", "run"]
# Flag and what the Trainer that trains then is; all at once. What Lightning does with it is Lightning's to test.
REACHES = {
    "accelerator": ("cpu", lambda trainer: trainer.strategy.root_device.type == "cpu"),
    "strategy": ("ddp", lambda trainer: type(trainer.strategy).__name__ == "DDPStrategy"),
    "devices": ("2", lambda trainer: trainer.world_size == 2),
    "precision": ("64-true", lambda trainer: trainer.precision == "64-true"),
    "logger": ("false", lambda trainer: trainer.loggers == []),
    "callbacks": ("LearningRateMonitor", lambda trainer: "LearningRateMonitor" in names(trainer.callbacks)),
    "max_epochs": ("3", lambda trainer: trainer.max_epochs == 3),
    "min_epochs": ("2", lambda trainer: trainer.min_epochs == 2),
    "max_steps": ("7", lambda trainer: trainer.max_steps == 7),
    "min_steps": ("6", lambda trainer: trainer.min_steps == 6),
    "max_time": ("00:00:10:00", lambda trainer: 600 in [c._duration for c in trainer.callbacks if type(c) is Timer]),
    "limit_train_batches": ("3", lambda trainer: trainer.limit_train_batches == 3),
    "limit_val_batches": ("0.5", lambda trainer: trainer.limit_val_batches == 0.5),
    "limit_test_batches": ("2", lambda trainer: trainer.limit_test_batches == 2),
    "limit_predict_batches": ("4", lambda trainer: trainer.limit_predict_batches == 4),
    "val_check_interval": ("2", lambda trainer: trainer.val_check_interval == 2),
    "check_val_every_n_epoch": ("2", lambda trainer: trainer.check_val_every_n_epoch == 2),
    "enable_checkpointing": ("false", lambda trainer: trainer.checkpoint_callbacks == []),
    "accumulate_grad_batches": ("2", lambda trainer: trainer.accumulate_grad_batches == 2),
    "gradient_clip_val": ("0.5", lambda trainer: trainer.gradient_clip_val == 0.5),
    "gradient_clip_algorithm": ("value", lambda trainer: trainer.gradient_clip_algorithm == "value"),
    "deterministic": ("warn", lambda _: torch.is_deterministic_algorithms_warn_only_enabled()),
    "benchmark": ("true", lambda _: torch.backends.cudnn.benchmark),
    "plugins": (f"{__name__}.OwnEnvironment", lambda trainer: has_own_environment(trainer)),
}
# They change no number of a run.
NEUTRAL = {
    "num_sanity_val_steps": "2",
    "log_every_n_steps": "1",
    "enable_progress_bar": "false",
    "enable_model_summary": "true",
    "inference_mode": "false",
    "profiler": "simple",
    "detect_anomaly": "true",
    "reload_dataloaders_every_n_epochs": "1",
    "enable_autolog_hparams": "false",
}
ELSEWHERE = {
    "overfit_batches": "training/test_overfit_batches.py",
    "num_nodes": "end_to_end/test_several_processes.py",
}
HERE = {"fast_dev_run", "sync_batchnorm"}  # the latter as far as there are no two GPUs


def names(objects):
    return [type(one).__name__ for one in objects]


class OwnEnvironment(LightningEnvironment):
    """A cluster environment of a user's."""


class Elsewhere(TorchCheckpointIO):
    """A user's way to write checkpoints, whose name does not say so."""


def has_own_environment(trainer):
    return type(trainer.strategy.cluster_environment).__name__ == "OwnEnvironment"


def test_every_argument_of_lightning_has_a_verdict_and_what_works_a_test():
    signature = inspect.signature(pl.Trainer).parameters
    assert set(ARGUMENTS) == set(signature)
    works = {name for name, argument in ARGUMENTS.items() if argument.does}
    assert works == {*REACHES, *NEUTRAL, *ELSEWHERE, *HERE}
    assert all(name in (REPO / "tests" / file).read_text() for name, file in ELSEWHERE.items())
    assert all(argument.does or argument.refused for argument in ARGUMENTS.values())


def test_the_docs_have_the_table():
    assert (REPO / PAGE).read_text(encoding="utf-8") == page_text()


@pytest.fixture(autouse=True)
def torch_flags():
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


# Lightning advises against both at once, which all arguments together are.
@pytest.mark.filterwarnings("ignore:You passed `deterministic=True` and `benchmark=True`")
def test_what_is_given_reaches_the_trainer(tmp_path, monkeypatch):
    class Reached(Exception):
        pass

    @functools.wraps(pl.Trainer.fit)  # LightningCLI reads its arguments
    def fit(trainer, *args, **kwargs):
        assert [name for name, (_, reaches) in REACHES.items() if not reaches(trainer)] == []
        raise Reached

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pl.Trainer, "fit", fit)
    flags = [f"--trainer.{name}={value}" for name, (value, _) in REACHES.items()]
    with pytest.raises(Reached):
        run_command(["fit", *SMALL, *flags])


@pytest.mark.slow
def test_what_only_looks_changes_no_number_and_shows_what_it_saw(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_command(["fit", *SMALL, "--epochs", "2"])
    usual = (tmp_path / "run" / "metrics.csv").read_text()
    (tmp_path / "run").rename("usual")
    capsys.readouterr()
    run_command(["fit", *SMALL, "--epochs", "2", *(f"--trainer.{name}={value}" for name, value in NEUTRAL.items())])
    assert (tmp_path / "run" / "metrics.csv").read_text() == usual
    assert "Trainable params" in capsys.readouterr().out
    boards = [b"".join(p.read_bytes() for p in (tmp_path / run).glob("events*")) for run in ("usual", "run")]
    assert [b"_hparams_" in board for board in boards] == [True, False]


def test_what_a_profiler_or_verbose_asks_for_is_logged():
    with quiet():
        for module in ("profilers.profiler", "callbacks.early_stopping"):
            assert logging.getLogger(f"lightning.pytorch.{module}").isEnabledFor(logging.INFO)
        shared = logging.getLogger("lightning.pytorch.utilities.rank_zero")
        for file, is_heard in (("callbacks/model_checkpoint.py", True), ("trainer/setup.py", False)):
            record = shared.makeRecord(shared.name, logging.INFO, f"lightning/pytorch/{file}", 1, "text", (), None)
            assert shared.isEnabledFor(logging.INFO)
            assert bool(shared.filter(record)) == is_heard


@pytest.mark.parametrize("value", ["true", "2"])
def test_fast_dev_run_leaves_nothing(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    seen = {}
    monkeypatch.setattr(pl.Trainer, "test", lambda trainer, *args, **kwargs: seen.update(steps=trainer.global_step))
    run_command(["fit", *SMALL, "--trainer.fast_dev_run", value])
    assert seen == {"steps": 2 if value == "2" else 1}
    assert os.listdir(tmp_path) == []


REFUSED = [
    ("accelerator=tpu", "one of auto, cpu"),
    ("strategy=ddp_spawn", "one of auto, single_device, ddp"),
    ("strategy=ddp_fork", "others fork this process"),
    ("strategy=ddp_notebook", "others fork this process"),
    ("strategy=ddp_notebook_find_unused_parameters_false", "others fork this process"),
    (
        "strategy={class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {start_method: spawn}}",
        "one of auto",
    ),
    ("strategy=fsdp", "one of auto"),
    ("strategy={class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {start_method: fork}}", "one of auto"),
    ("devices=3 strategy=single_device", "--trainer.strategy single_device uses one"),
    ("devices=0,1 strategy=single_device", "--trainer.strategy single_device uses one"),
    ("num_nodes=2", "torchrun or SLURM"),
    ("num_nodes=0", "1 or more"),
    ("precision=transformer-engine", "replaces layers"),
    ("fast_dev_run=-1", "0 or more"),
    ("max_epochs=-2", "1 or more, or -1 with --trainer.max_steps"),
    ("max_epochs=-1", "1 or more, or -1 with --trainer.max_steps"),
    ("max_epochs=0", "1 or more, or -1 with --trainer.max_steps"),
    ("min_epochs=5 max_epochs=2", "more than --epochs"),
    ("min_epochs=-1", "0 or more"),
    ("max_steps=-2", "-1 or more"),
    ("max_steps=-1 max_epochs=null", "needs an end"),
    ("min_steps=5 max_steps=2", "more than --trainer.max_steps"),
    ("max_time=1", "days:hours:minutes:seconds"),
    ("max_time=00:00:00:00", "above 0"),
    ("max_time={minutes: 0}", "above 0"),
    ("limit_train_batches=0", "a fraction"),
    ("limit_train_batches=-1", "a fraction"),
    ("limit_val_batches=1.5", "whole number"),
    ("limit_train_batches=2.0", "whole number"),
    ("val_check_interval=2.0", "whole number"),
    ("limit_test_batches=0", "a fraction"),
    ("limit_predict_batches=0", "a fraction"),
    ("overfit_batches=-1", "a fraction"),
    ("overfit_batches=2.0", "whole number"),
    ("overfit_batches=1 limit_val_batches=0", "leave limit_train_batches"),
    ("val_check_interval=1.5", "whole number"),
    ("check_val_every_n_epoch=5 max_epochs=2", "nothing would be validated"),
    ("num_sanity_val_steps=-5", "-1 or more"),
    ("log_every_n_steps=-1", "0 or more"),
    ("accumulate_grad_batches=0", "1 or more"),
    ("gradient_clip_val=-1", "0 (off)"),
    ("gradient_clip_algorithm=foo gradient_clip_val=1", "norm or value"),
    ("gradient_clip_algorithm=value", "without --trainer.gradient_clip_val"),
    ("use_distributed_sampler=false", "deal each batch"),
    ("profiler=xla", "simple, advanced, pytorch"),
    ("barebones=true", "keeps logs and checkpoints"),
    ("plugins=lightning.pytorch.plugins.io.AsyncCheckpointIO", "durably"),
    (f"plugins={__name__}.Elsewhere", "durably"),
    ("plugins=lightning.pytorch.plugins.DoublePrecision", "--trainer.precision"),
    ("plugins=[{class_path: lightning.pytorch.plugins.HalfPrecision}]", "--trainer.precision"),
    ("sync_batchnorm=true accelerator=cpu", "needs GPUs"),
    ("reload_dataloaders_every_n_epochs=-1", "0 or more"),
    ("default_root_dir=elsewhere", "--run_dir"),
    ("model_registry=name", "uploaded"),
]


@pytest.mark.parametrize(("flags", "reason"), REFUSED, ids=[flags for flags, _ in REFUSED])
def test_a_value_is_refused_with_its_flag_and_the_reason(parser, flags, reason):
    given = [flags] if "{" in flags else flags.split()
    name, _, _ = given[0].partition("=")
    with pytest.raises(UserError) as error:
        check_arguments("fit", parser.parse_args([f"--trainer.{flag}" for flag in given]))
    assert str(error.value).startswith((f"--trainer.{name} ", "--epochs ", "--trainer.max_steps "))
    assert reason in str(error.value)


@pytest.fixture
def gpus_of_a_notebook(monkeypatch):
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("gpus_of_a_notebook")
@pytest.mark.parametrize("devices", ["2", "[0, 1]", "-1"])
def test_a_notebook_trains_on_no_more_than_one_device_and_evaluates_a_run_of_several_on_one(devices, capsys):
    trainer = Namespace(devices=devices, strategy="ddp", accelerator="auto")
    with pytest.raises(UserError, match=r"--trainer\.devices .*give --trainer\.devices 1"):
        settle_devices("fit", trainer)
    settle_devices("test", trainer)
    assert (trainer.devices, trainer.strategy) == (1, "auto")
    assert "one device" in capsys.readouterr().out


@pytest.mark.usefixtures("gpus_of_a_notebook")
def test_a_notebook_trains_by_ddp_on_one_device_without_it():
    settle_devices("fit", trainer := Namespace(devices="1", strategy="ddp", accelerator="auto"))
    assert (trainer.devices, trainer.strategy) == ("1", "auto")


@pytest.mark.usefixtures("gpus_of_a_notebook")
def test_a_notebook_on_one_device_says_that_other_gpus_are_idle(capsys):
    for devices, accelerator, idle in (("auto", "auto", True), ("auto", "cpu", False), ("1", "gpu", False)):
        settle_devices("fit", trainer := Namespace(devices=devices, strategy="auto", accelerator=accelerator))
        assert trainer.devices == devices
        assert ("1 of 2 GPUs" in capsys.readouterr().out) is idle


def test_an_interactive_python_is_noticed_where_settings_are_parsed(monkeypatch):
    flags = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--seed_everything=false"]
    assert TrainingCLI("fit", flags).settings.trainer.devices == "2"
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(UserError, match=r"--trainer\.devices 2"):
        TrainingCLI("fit", flags)


def test_every_argument_with_refused_values_has_such_a_case():
    cases = {flags.partition("=")[0] for flags, _ in REFUSED} | {"devices"}
    assert {name for name, argument in ARGUMENTS.items() if argument.refused or argument.limits} <= cases


@pytest.mark.parametrize(
    "flags",
    [
        ["strategy={class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {bucket_cap_mb: 5}}"],
        ["max_epochs=-1", "max_steps=5"],
        ["limit_val_batches=0"],
        ["overfit_batches=1.0"],
        ["check_val_every_n_epoch=null"],
        ["sync_batchnorm=false", "barebones=false", "use_distributed_sampler=true"],
    ],
)
def test_what_is_next_to_it_is_taken(parser, flags):
    check_arguments("fit", parser.parse_args([f"--trainer.{flag}" for flag in flags]))


def test_what_only_training_reads_does_not_keep_a_run_from_being_tested_elsewhere(parser):
    config = parser.parse_args(["--trainer.sync_batchnorm=true", "--trainer.accelerator=cpu", "--trainer.max_epochs=0"])
    config.ckpt_path = __file__
    check_arguments("test", config)


def test_a_time_may_be_given_in_all_of_lightnings_ways(parser):
    for value in ("00:00:00:05", "{minutes: 5}"):
        check_arguments("fit", parser.parse_args([f"--trainer.max_time={value}"]))
    config = parser.parse_args([])
    config.trainer.max_time = timedelta(0)
    with pytest.raises(UserError, match="max_time"):
        check_arguments("fit", config)


@pytest.mark.parametrize(("command", "expected"), [("test", "only with fit"), ("fit", "leave out .* or --ckpt_path")])
def test_fast_dev_run_is_of_a_new_run_alone(parser, command, expected):
    config = parser.parse_args(["--trainer.fast_dev_run=1"])
    config.ckpt_path = __file__
    with pytest.raises(UserError, match=expected):
        check_arguments(command, config)


@pytest.mark.parametrize("flags", [["--trainer.limit_val_batches", "0.01"], ["--trainer.limit_test_batches", "0.01"]])
def test_a_fraction_without_a_batch_leaves_no_run(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=flags[0]):
        run_command(["fit", *SMALL, "--epochs", "1", *flags])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("off", [["--trainer.limit_val_batches", "0"], ["--data.val_fraction", "0"]])
def test_early_stopping_is_not_set_where_nothing_is_validated(tmp_path, monkeypatch, off):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--early_stopping\.patience 3"):
        run_command(["fit", *SMALL, "--early_stopping.patience", "3", *off])
    assert os.listdir(tmp_path) == []
