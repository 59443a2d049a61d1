"""A run that never began leaves nothing, and its message keeps the cause; warnings do not steer a terminal."""

import logging
import signal
import sys
import warnings

import lightning.pytorch as pl
import pytest
from program import TINY, fail

from cifar_lightning.cli import main as cli


@pytest.fixture(autouse=True)
def _no_announced_run(monkeypatch):
    monkeypatch.setenv("CIFAR_LIGHTNING_RUN_DIR", "")  # restored after the test, in which a run announces itself
    monkeypatch.delenv("CIFAR_LIGHTNING_RUN_DIR")


SMALL = [*TINY, "--data.limit", "200", "--batch_size", "20", "--epochs", "1"]


class FailsInSetup(pl.Callback):
    def setup(self, trainer, pl_module, stage):
        raise KeyError("no such key")


class FailsAtStart(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        raise RuntimeError("late\nand \x1b[2J loud")


class FailsWhenMade(pl.Callback):
    def __init__(self, size: int = 1):
        raise LookupError("cannot be made")


class Interrupts(pl.Callback):
    def setup(self, trainer, pl_module, stage):
        signal.raise_signal(signal.SIGINT)


def of_here(kind):
    return f"[{{class_path: {__name__}.{kind.__name__}}}]"


def monitoring(kind, monitor):
    return f"[{{class_path: {kind}, init_args: {{monitor: {monitor}}}}}]"


CSV_LOGGER = ["--trainer.logger", "{class_path: CSVLogger, init_args: {save_dir: .}}"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--trainer.callbacks", of_here(FailsInSetup)], ["FailsInSetup", "KeyError", "no such key"]),
        (
            ["--trainer.callbacks", of_here(FailsAtStart), "--run_dir", "a/b/c", *CSV_LOGGER],
            ["FailsAtStart", r"late and \x1b[2J loud"],
        ),
        (["--trainer.callbacks", of_here(FailsWhenMade)], ["FailsWhenMade", "LookupError", "cannot be made"]),
        (["--trainer.callbacks", "lightning.pytorch.callbacks.BackboneFinetuning"], ["BackboneFinetuning", "groups"]),
        (["--trainer.callbacks", monitoring("EarlyStopping", "val_acc")], ["val_acc", "Did you mean val/acc?"]),
        (["--trainer.logger", "lightning.pytorch.loggers.WandbLogger"], ["WandbLogger", "pip install", "wandb"]),
    ],
)
def test_a_run_that_cannot_begin_is_refused_with_the_cause_and_leaves_nothing(
    monkeypatch, capsys, tmp_path, flags, words
):
    said = fail(monkeypatch, capsys, tmp_path, "fit", *SMALL, *flags)
    assert list(tmp_path.iterdir()) == []
    assert [word for word in words if word not in said] == []
    assert "Traceback" not in said


def test_an_interrupt_before_the_first_epoch_leaves_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    arguments = ["fit", *SMALL, "--trainer.callbacks", of_here(Interrupts), "--run_dir", "mine/1"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("run_dir: 007", "run_dir 7"), ("run_dir: yes", "run_dir true"), ("data: {root: 7}", "data.root 7")],
)
def test_a_number_where_text_is_meant_asks_for_quotes(monkeypatch, capsys, tmp_path, text, value):
    (tmp_path / "c.yaml").write_text(text)
    said = fail(monkeypatch, capsys, tmp_path, "fit", "--config", "c.yaml")
    assert value in said
    assert "quote it" in said


@pytest.mark.parametrize("flags", [["--run_dir=~/x/1"], ["--config", "c.yaml"], ["--run_dir", "~/x/1"]])
def test_a_path_from_home_is_one_folder(monkeypatch, capsys, tmp_path, flags):
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "c.yaml").write_text("run_dir: ~/x/1\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    seen = []
    monkeypatch.setattr("cifar_lightning.cli.fit.create_run", lambda base, name, run_dir: seen.append(run_dir) or 1 / 0)
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", *SMALL, *flags])
    with pytest.raises(ZeroDivisionError):
        cli.main()
    assert [str(path) for path in seen] == [str(tmp_path / "home" / "x" / "1")]
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["c.yaml"]


def test_warnings_of_libraries_cannot_steer_a_terminal(monkeypatch, capsys):
    def warn(argv):
        warnings.warn("bad\x1b]0;title\x07\nname", stacklevel=1)
        return 0

    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(cli, "run_command", warn)
    with warnings.catch_warnings(action="always"), pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "warning: bad\\x1b]0;title\\x07\\nname\n"
    assert logging.lastResort.format(logging.makeLogRecord({"msg": "a\x1b[2J"})) == "warning: a\\x1b[2J"
