"""fit --seeds: one run for each seed, in processes of their own."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from program import REPO, TINY, fail, start

from benchmarks.faults.judge import differences
from cifar_lightning.checkpoints.loading import read_checkpoint
from cifar_lightning.cli import main as cli
from cifar_lightning.cli import seeds
from cifar_lightning.errors import UserError
from cifar_lightning.files import write_json, write_text_durably
from cifar_lightning.runs.contents import read_json, read_seeds
from cifar_lightning.runs.folder import RunFolder, config_name, create_run, open_run
from cifar_lightning.runs.lock import RunLock, is_locked

ACCURACY = {0: 0.5, 1: 0.625, 2: 0.875}


class Fits:
    """Stands for the program: writes what a fit leaves, with the exit status asked for."""

    def __init__(self):
        self.commands, self.status = [], {}

    def __call__(self, *arguments):
        self.commands.append(list(arguments))
        flags = dict(flag.split("=", 1) for flag in arguments[1:])
        run = RunFolder(Path(flags.get("--run_dir") or flags["--resume"]))
        seed = int(run.path.name)
        status = self.status.get(seed, 0)
        if status != 2:
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            write_text_durably(run.config, yaml.safe_dump({"seed_everything": seed}))
            run.last_checkpoint.touch()
        if status == 0:
            interval = [ACCURACY[seed] - 0.1, ACCURACY[seed] + 0.1]
            write_json(run.test_metrics, {"accuracy": ACCURACY[seed], "accuracy_interval_95": interval})
            run.report.touch()
        return status


@pytest.fixture
def fits(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = Fits()
    monkeypatch.setattr(seeds, "_run_program", made)
    return made


def test_each_seed_is_a_run_and_the_later_ones_take_the_config_of_the_first(fits, capsys):
    assert cli.run_command(["fit", "--seeds", "0,1,2", "--epochs", "3", "--run_dir", "out"]) == 0
    seeded = [[f"--seed_everything={s}", f"--data.order_seed={s}", f"--run_dir=out/{s}"] for s in range(3)]
    of_first = ["--config=out/0/config.yaml", "--trust_code=true"]
    assert fits.commands[0] == ["fit", "--trainer.max_epochs=3", *seeded[0]]
    assert fits.commands[1:] == [["fit", *of_first, *seeded[1]], ["fit", *of_first, *seeded[2]]]
    found = read_seeds(RunFolder(Path("out")).seeds)
    values = list(ACCURACY.values())
    expected = [3, np.mean(values), np.std(values, ddof=1), 0.5, 0.875]
    assert list(found["accuracy"].values()) == pytest.approx(expected)
    assert [(row["seed"], row["accuracy"]) for row in found["runs"]] == list(ACCURACY.items())
    last = capsys.readouterr().out.splitlines()[-2]
    assert {"66.67", "19.09", "50.00", "87.50"} <= set(last.replace(",", "").split())


def test_seeds_of_a_config_are_replaced_and_named(fits, capsys):
    Path("own.yaml").write_text("seed_everything: 71\ndata: {order_seed: 53, seed: 29}\n")
    assert cli.run_command(["fit", "--config", "own.yaml", "--seeds", "2", "--run_dir", "out"]) == 0
    assert fits.commands[0][2:4] == ["--seed_everything=2", "--data.order_seed=2"]
    told = capsys.readouterr().err
    assert {"--seeds", "71", "53", "own.yaml."} <= set(told.split())
    assert "29" not in told
    assert cli.run_command(["fit", "--config", "quickstart", "--seeds", "2"]) == 0
    assert capsys.readouterr().err == ""


def test_a_config_may_name_the_folder_of_the_runs(fits):
    Path("own.yaml").write_text("run_dir: mine\n")
    assert cli.run_command(["fit", "--config", "own.yaml", "--seeds", "0,1"]) == 0
    assert [command[-1] for command in fits.commands] == ["--run_dir=mine/0", "--run_dir=mine/1"]
    assert cli.run_command(["fit", "--config", "own.yaml", "--seeds", "1", "--run_dir", "out"]) == 0
    assert fits.commands[-1][-1] == "--run_dir=out/1"


def test_the_name_of_the_folder_is_that_of_config_or_model_and_the_next_number(fits):
    assert cli.run_command(["fit", "--seeds", "1", "--config", "quickstart"]) == 0
    assert cli.run_command(["fit", "--seeds", "1", "--model.name", "speednet"]) == 0
    assert cli.run_command(["fit", "--seeds", "1"]) == 0
    assert cli.run_command(["fit", "--seeds", "1"]) == 0
    folders = [command[-1].removeprefix("--run_dir=runs/") for command in fits.commands]
    assert folders == ["quickstart/1/1", "speednet/1/1", "smallnet/1/1", "smallnet/2/1"]
    assert read_seeds(RunFolder(Path("runs/smallnet/2")).seeds)["accuracy"]["std"] is None
    assert config_name(["runs/quickstart/1/1/config.yaml"], "smallnet") == "quickstart"


def test_a_resume_trains_what_is_not_finished_and_begins_what_is_missing(fits, tmp_path):
    fits.status[1] = 143
    assert cli.run_command(["fit", "--seeds", "0,1,2", "--run_dir", "out"]) == 143
    assert [command[-1] for command in fits.commands] == ["--run_dir=out/0", "--run_dir=out/1"]
    assert read_json(tmp_path / "out" / "seeds.json")["accuracy"]["n"] == 1
    fits.status, fits.commands = {}, []
    assert cli.run_command(["fit", "--resume", "out", "--trust_code", "true"]) == 0
    config = ["--config=out/0/config.yaml", "--trust_code=true"]
    # With flags a finished run is resumed, too: they may change it.
    assert [command[1:3] for command in fits.commands] == [
        ["--resume=out/0", "--trust_code=true"],
        ["--resume=out/1", "--trust_code=true"],
        config,
    ]
    fits.commands = []
    (tmp_path / "out" / "1" / "report.html").unlink()
    assert cli.run_command(["fit", "--resume", "out"]) == 0
    assert fits.commands == [["fit", "--resume=out/1"]]
    assert read_json(tmp_path / "out" / "seeds.json")["accuracy"]["n"] == 3


def test_a_folder_in_which_nothing_has_begun_starts_over_and_links_in_it_are_refused(fits, tmp_path):
    (tmp_path / "out").mkdir()
    write_json(tmp_path / "out" / "seeds.json", {"seeds": [0, 1]})
    with pytest.raises(UserError, match="--resume out"):
        cli.run_command(["fit", "--resume", "out"])
    assert fits.commands == []
    assert cli.run_command(["fit", "--seeds", "2,0", "--run_dir", "out"]) == 0
    assert [command[-1] for command in fits.commands] == ["--run_dir=out/2", "--run_dir=out/0"]
    (tmp_path / "out" / "0").rename(tmp_path / "elsewhere")
    (tmp_path / "out" / "0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="out/0"):
        cli.run_command(["fit", "--resume", "out"])


def test_a_finished_run_whose_accuracy_is_not_known_is_left_out_of_the_mean(fits, capsys):
    assert cli.run_command(["fit", "--seeds", "0,1,2", "--run_dir", "out"]) == 0
    write_json(RunFolder(Path("out/1")).test_metrics, {"accuracy": None})
    assert cli.run_command(["fit", "--resume", "out"]) == 0
    found = read_seeds(RunFolder(Path("out")).seeds)
    assert (found["accuracy"]["n"], found["accuracy"]["max"]) == (2, 0.875)
    assert "2 of 3 seeds" in capsys.readouterr().out
    for seed in (0, 2):
        write_json(RunFolder(Path(f"out/{seed}")).test_metrics, {"accuracy": None})
    assert cli.run_command(["fit", "--resume", "out"]) == 0
    assert read_seeds(RunFolder(Path("out")).seeds)["accuracy"] is None


def test_a_run_that_fails_keeps_no_other_from_training_a_mistake_and_a_kill_do(fits, tmp_path):
    fits.status[1] = 1
    assert cli.run_command(["fit", "--seeds", "0,1,2", "--run_dir", "failed"]) == 1
    assert (len(fits.commands), read_json(tmp_path / "failed" / "seeds.json")["accuracy"]["n"]) == (3, 2)
    fits.status, fits.commands = {1: 137}, []
    assert cli.run_command(["fit", "--seeds", "0,1,2", "--run_dir", "killed"]) == 137
    assert len(fits.commands) == 2


def test_a_mistake_before_the_first_run_leaves_no_folder(fits, tmp_path):
    fits.status[0] = 2
    assert cli.run_command(["fit", "--seeds", "0,1"]) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert cli.run_command(["fit", "--seeds", "0,1", "--run_dir", "mine"]) == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_the_folder_is_locked_and_never_overwritten(fits, tmp_path):
    assert cli.run_command(["fit", "--seeds", "0", "--run_dir", "out"]) == 0
    for words in (["fit", "--seeds", "0,1", "--run_dir", "out"], ["fit", "--seeds", "5", "--run_dir", "out/0"]):
        with pytest.raises(UserError, match="--run_dir out"):
            cli.run_command(words)
    with pytest.raises(UserError, match="--run_dir"):
        create_run(tmp_path, "name", tmp_path / "out")
    with RunLock(tmp_path / "out" / ".lock"), pytest.raises(UserError, match=str(os.getpid())):
        cli.run_command(["fit", "--resume", "out"])
    with pytest.raises(UserError, match="out/0"):
        open_run(tmp_path / "out")


def test_runs_that_other_commands_left_in_the_folder_are_not_taken_for_those_of_the_seeds(fits, tmp_path):
    assert cli.run_command(["fit", "--seeds", "0,1", "--run_dir", "out"]) == 0
    (tmp_path / "out" / "seeds.json").unlink()
    (tmp_path / "out" / "1" / "checkpoints" / "last.ckpt").unlink()
    fits.commands = []
    for values, run in (("0,1", "0"), ("1,2", "1")):
        with pytest.raises(UserError, match=f"--run_dir out: out/{run} holds a run"):
            cli.run_command(["fit", "--seeds", values, "--epochs", "9", "--run_dir", "out"])
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0", "1"]
    assert fits.commands == []
    assert cli.run_command(["fit", "--seeds", "2", "--epochs", "9", "--run_dir", "out"]) == 0
    assert fits.commands[0][:2] == ["fit", "--trainer.max_epochs=9"]


@pytest.mark.parametrize("value", ["", ",", "a", "0,0", "0,1,", "-1", "1.5", "[0,1]", "4294967296", "9" * 5000, "²"])
def test_other_values_than_distinct_seeds_are_refused(monkeypatch, capsys, tmp_path, value):
    assert "--seeds" in fail(monkeypatch, capsys, tmp_path, "fit", f"--seeds={value}")


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "--seeds", "0,1", "--resume", "out"],
        ["fit", "--seeds", "0,1", "--seed_everything", "1"],
        ["fit", "--seeds", "0,1", "--data.order_seed", "1"],
        ["fit", "--seeds", "0,1", "--ckpt_path", "last.ckpt"],
        ["fit", "--seeds", "0,1", "--tune_lr"],
        ["fit", "--seeds", "0,1", "--trainer.fast_dev_run", "1"],
        ["fit", "--seeds", "0,1", "--print_config"],
        ["validate", "--seeds", "0,1", "--ckpt_path", "last.ckpt"],
        ["tune", "--seeds", "0,1"],
    ],
)
def test_what_is_of_a_single_run_is_refused_with_seeds(monkeypatch, capsys, tmp_path, words):
    assert "--seeds" in fail(monkeypatch, capsys, tmp_path, *words)


@pytest.mark.parametrize("line", ["tune_lr: true", "ckpt_path: last.ckpt", "trainer: {fast_dev_run: 1}"])
def test_neither_does_a_config_have_it(monkeypatch, capsys, tmp_path, line):
    (tmp_path / "own.yaml").write_text(line)
    said = fail(monkeypatch, capsys, tmp_path, "fit", "--seeds", "0,1", "--config", "own.yaml")
    assert f"own.yaml: {line.strip('}').replace(': {', '.').partition(':')[0]} with --seeds" in said


def test_the_folder_of_seeds_takes_no_settings_of_new_runs_and_may_be_damaged(monkeypatch, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    write_json(tmp_path / "out" / "seeds.json", {"seeds": [0, 1]})
    for name in ("config", "seed_everything", "init_weights"):
        words = ["fit", "--resume", "out", f"--{name}", "0"]
        assert f"--{name}" in fail(monkeypatch, capsys, tmp_path, *words)
    (tmp_path / "out" / "seeds.json").write_text('{"seeds": ["../../0"]}')
    assert "seeds.json" in fail(monkeypatch, capsys, tmp_path, "fit", "--resume", "out")


def test_seeds_are_refused_in_several_processes_started_from_outside(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert "--seeds" in fail(monkeypatch, capsys, tmp_path, "fit", "--seeds", "0,1")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_signals_reach_the_run_and_decide_the_exit_status(monkeypatch, tmp_path, name):
    signum = getattr(signal, name)
    if signal.getsignal(signum) == signal.SIG_IGN:
        pytest.skip("as under nohup")
    ready, got, ended = tmp_path / "ready", tmp_path / "got", threading.Event()
    program = tmp_path / "train.py"
    program.write_text(
        "import pathlib, signal, sys\n"
        f"signal.signal({int(signum)}, lambda *_: (pathlib.Path({str(got)!r}).touch(), sys.exit(0)))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "signal.pause()\n"
    )
    monkeypatch.setattr(sys, "argv", [str(program), "fit", "--seeds", "0"])
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, *sys.argv])

    def send():
        while not ready.exists():
            if ended.wait(0.01):
                return
        os.kill(os.getpid(), signum)

    threading.Thread(target=send, daemon=True).start()
    before = signal.getsignal(signum)
    status = seeds._run_program("fit")
    ended.set()
    assert status == 128 + signum
    assert got.exists()
    assert signal.getsignal(signum) is before


def test_on_windows_the_console_sends_ctrl_c_to_the_run(monkeypatch):
    class Process(contextlib.nullcontext):
        """As on Windows, whose processes take only SIGTERM."""

        def __init__(self, *_, **__):
            super().__init__(self)

        def send_signal(self, signum):
            raise ValueError(f"Unsupported signal: {signum}")

        def wait(self):
            signal.raise_signal(signal.SIGINT)
            return 0

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(subprocess, "Popen", Process)
    assert seeds._run_program("fit") == 130


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a child notices the end of its parent on Linux")
def test_seeds_killed_and_resumed_are_bit_for_bit_the_runs_of_single_fits(tmp_path):
    flags = [*TINY, "--epochs", "2", "--data.seed", "7"]
    flags += ["--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    command = [sys.executable, REPO / "train.py", "fit", *flags, "--seeds", "3,1", "--run_dir", "out"]
    first, second = (RunFolder(tmp_path / "out" / seed) for seed in "31")
    with (tmp_path / "log").open("w") as log:
        program = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        while not first.last_checkpoint.exists():
            assert program.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        program.kill()
        program.wait()
    deadline = time.monotonic() + 60
    while is_locked(first.lock_file):  # it saves and stops
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not second.path.exists()
    start("fit", "--resume", "out", cwd=tmp_path)
    for run, seed in ((first, "3"), (second, "1")):
        start("fit", *flags, "--seed_everything", seed, "--data.order_seed", seed, "--run_dir", seed, cwd=tmp_path)
        single = RunFolder(tmp_path / seed)
        assert run.metrics_csv.read_bytes() == single.metrics_csv.read_bytes()
        for name in ("state_dict", "optimizer_states"):
            one, other = (read_checkpoint(each.last_checkpoint)[name] for each in (run, single))
            assert differences(one, other) == []
        arrays = [dict(np.load(each.predictions)) for each in (run, single)]
        assert all(np.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[0])
        splits = [read_json(each.split) for each in (run, single)]
        assert splits[0] == splits[1]
    assert read_json(first.split) == read_json(second.split)
    assert first.metrics_csv.read_bytes() != second.metrics_csv.read_bytes()
    found = read_seeds(tmp_path / "out" / "seeds.json")
    values = [read_json(run.test_metrics)["accuracy"] for run in (first, second)]
    assert found["accuracy"] == pytest.approx(
        {"n": 2, "mean": np.mean(values), "std": np.std(values, ddof=1), "min": min(values), "max": max(values)}
    )
