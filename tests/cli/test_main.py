"""The front: help and mistakes are answered without torch, run folders are spelled out, a whole story as a new user."""

import csv
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from program import REPO, TINY, fail, start

from cifar_lightning.cli.flags import table
from cifar_lightning.cli.help import TRAINING
from cifar_lightning.cli.main import QUICK, run_command, training_arguments
from cifar_lightning.data import image_folder, shard_writer
from cifar_lightning.data.datasets import open_source
from cifar_lightning.errors import UserError
from cifar_lightning.runs.folder import RunFolder

PREDICT = ["predict", "--ckpt_path", __file__, "--data.dataset", "synthetic"]


@pytest.fixture
def run(tmp_path):
    """A folder that looks like a run with a best and a last checkpoint."""
    run = RunFolder(tmp_path / "runs" / "smallnet" / "1")
    run.checkpoints.mkdir(parents=True)
    run.config.write_text("{}")
    run.best_checkpoint.touch()
    run.last_checkpoint.touch()
    return run


def test_the_package_runs_as_a_program_from_any_folder(tmp_path):
    command = [sys.executable, "-m", "cifar_lightning", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"cifar-lightning {importlib.metadata.version('cifar-lightning')}\n"


# -- help ----------------------------------------------------------------------------------------------------------


def test_help_and_version_go_to_stdout_and_succeed(capsys):
    for command in ([], ["--help"], ["--version"], *([name, "--help"] for name in (*TRAINING, *QUICK))):
        assert run_command(command) == (0 if command else 2)
        assert capsys.readouterr().out
    run_command(["--version"])
    assert capsys.readouterr().out == f"cifar-lightning {importlib.metadata.version('cifar-lightning')}\n"


def test_what_follows_two_dashes_is_no_flag():
    parsed = QUICK["predict-images"].parser("predict-images").parse(["run", "--force", "--", "--odd.png", "a.png"])
    assert (parsed.run, parsed.paths, parsed.force) == (Path("run"), [Path("--odd.png"), Path("a.png")], True)


def test_the_long_help_is_lightnings_but_for_what_it_does_otherwise_here(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(["fit", "--help-all"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert table().keys() - set(re.findall(r"--([\w.]+)", shown)) == set()
    for words in ("infinite training", "hpc", "barebones mode", "instantiation.Set"):
        assert words not in " ".join(shown.split())


@pytest.mark.parametrize("reader", ["head -1", "true"])
def test_a_reader_that_stops_early_is_no_error(reader, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    command = f"{sys.executable} {REPO / 'train.py'} fit --help | {reader}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_an_error_is_told_also_where_nobody_reads_what_was_printed_before_it(monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    program = """
from cifar_lightning.cli import main
from cifar_lightning.errors import UserError
def run_command(argv):
    print('a table')
    raise UserError('--lr 0: a positive number.')
main.run_command = run_command
main.main()
"""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=REPO)
    os.close(writer)
    assert (done.returncode, done.stderr) == (2, "error: --lr 0: a positive number.\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_a_line_and_a_failure(unbuffered, tmp_path):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    for arguments in (["--help"], ["fit", "--help"], ["--version"]):
        with open("/dev/full", "wb") as full:
            settings = {"cwd": tmp_path, "env": environment, "stdout": full, "stderr": subprocess.PIPE, "timeout": 60}
            done = subprocess.run([sys.executable, REPO / "train.py", *arguments], **settings)
        assert done.stderr == b"error: cannot write: No space left on device.\n"
        assert done.returncode == 1


# -- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["predict-images", "smallnet", ""], "predict-images '': an empty value"),
        (["test", ""], "test '': an empty value"),
        (["export", "nowhere", "--format", "onnx", "--output=lr="], "there is no such folder"),
        (["download", "--root="], "download --root=: an empty value"),
        (["fit", "--model.name", "resnet19"], "Did you mean resnet18"),
        (["fit", "--config", "absent.yaml"], "absent.yaml: cannot be read"),
        (["fit", "--tune_lr", "--lr", "1"], "leave one of them out"),
        (["fit", "--tune_lr=yes", "--lr", "1"], "leave one of them out"),
        (["fit", "runs"], "fit takes no argument 'runs'"),
        (["fit", "--run_dir", "#3"], "--run_dir #3: is nothing in YAML; for a path: --run_dir ./#3"),
        (["fit", "--data.labels", "#all.csv"], "--data.labels ./#all.csv"),
        (["fti"], "Did you mean fit?"),
        (["test"], "give a run folder, or --ckpt_path"),
        (["validate", "--ckpt_path", "null"], "give a run folder, or --ckpt_path"),
        (["predict", "--data.dataset", "synthetic"], "give a run folder"),
        ([*PREDICT, "--output", "preds.txt"], "--output preds.txt: give a .csv or an .npz"),
        ([*PREDICT, "--output", "preds"], "--output preds: give a .csv or an .npz"),
        ([*PREDICT, "--output", "absent/preds.csv"], "there is no folder absent"),
        (["test", "nowhere"], "there is no such folder"),
        (["test", "."], "is not a run folder"),
        (["fit", "--resume", "nowhere"], "there is no such folder"),
        (["test", "--run_dir", "x", "--ckpt_path", "y"], "--run_dir: a flag of fit and tune, not of test"),
        (["analyze", "nowhere"], "there is no such folder"),
        (["export", "nowhere", "--format", "onnx"], "there is no such folder"),
        (["export", ".", "--format", "onx"], "'onnx'"),
        (["predict-images", ".", "a.png"], "is not a run folder"),
        (["predict-images", "--topk", "3"], "Did you mean --top_k?"),
        (["--print_completion", "fish"], "bash or zsh"),
    ],
)
def test_a_mistake_gets_a_short_message(monkeypatch, capsys, tmp_path, arguments, expected):
    assert expected in fail(monkeypatch, capsys, tmp_path, *arguments)


@pytest.mark.skipif(sys.platform == "win32", reason="no folder is removed while a program is in it")
@pytest.mark.parametrize(
    "arguments", [["fit", "--config", "quickstart"], ["doctor"], ["runs"], ["predict-images", "smallnet", "a.png"]]
)
def test_a_working_directory_that_was_removed_is_named(arguments, tmp_path):
    (folder := tmp_path / "removed").mkdir()
    command = 'rmdir "$PWD" && exec "$0" "$@"'
    words = ["bash", "-c", command, sys.executable, REPO / "train.py", *arguments]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the working directory cannot be found")
    assert len(done.stderr.splitlines()) == 2


def test_a_learning_rate_next_to_a_config_that_finds_one_is_not_ignored(monkeypatch, capsys, tmp_path):
    (tmp_path / "tuned.yaml").write_text("tune_lr: true\n")
    words = ["fit", "--config", "tuned.yaml", "--lr", "1"]
    assert "leave one of them out" in fail(monkeypatch, capsys, tmp_path, *words)
    flags, _ = training_arguments("fit", [*words[1:], "--tune_lr=False"])
    assert "--model.lr=1" in flags


@pytest.mark.parametrize(
    ("below", "named"),
    [(".", "checkpoints/best.ckpt"), ("checkpoints", "best.ckpt"), ("checkpoints", "../checkpoints/best.ckpt")],
)
def test_a_checkpoint_is_evaluated_with_its_runs_config_wherever_it_is_named_from(run, below, named, monkeypatch):
    monkeypatch.chdir(run.path / below)
    flags, _ = training_arguments("test", ["--ckpt_path", named])
    configs = [flag.removeprefix("--config=") for flag in flags if flag.startswith("--config=")]
    assert [os.path.realpath(config) for config in configs] == [os.path.realpath(run.config)]


@pytest.mark.parametrize("name", ["metrics.csv", "mistakes.csv", "gallery.npz"])
def test_predict_does_not_write_over_a_file_of_the_run(monkeypatch, capsys, tmp_path, name):
    for written in ("config.yaml", "split.json", name):
        (tmp_path / written).touch()
    assert f"--output {name}: is a file of the run" in fail(monkeypatch, capsys, tmp_path, *PREDICT, "--output", name)


def test_an_epochs_images_that_the_model_cannot_take_are_refused_before_a_run_is_made(monkeypatch, capsys, tmp_path):
    flags = ["--data.dataset", "synthetic", "--model.name", "speednet", "--data.train_sizes", "[8, 32]"]
    said = fail(monkeypatch, capsys, tmp_path, "fit", *flags)
    assert "--data.train_sizes [8, 32]: the model cannot take images of 8 pixels (" in said
    assert not (tmp_path / "runs").exists()


def test_a_mistake_in_a_real_process_exits_with_2_and_no_traceback(tmp_path):
    done = start("fit", "--data.dataset", "cifar11", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3
    assert done.stdout == ""


# -- run folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_a_run_folder_becomes_its_config_and_best_checkpoint(run, command):
    flags, resumed = training_arguments(command, [str(run.path), "--data.eval_batch_size=9"])
    assert flags == [f"--config={run.config}", "--data.eval_batch_size=9", f"--ckpt_path={run.best_checkpoint}"]
    assert resumed is None


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_a_checkpoint_in_a_run_folder_brings_the_runs_config_unless_another_is_given(run, command, tmp_path):
    given = [f"--ckpt_path={run.last_checkpoint}", "--data.eval_batch_size=9"]
    assert training_arguments(command, given) == ([f"--config={run.config}", *given], None)
    other = tmp_path / "other.yaml"
    other.write_text("data: {batch_size: 3}\n", encoding="utf-8")
    assert training_arguments(command, [f"--config={other}", *given]) == ([f"--config={other}", *given], None)
    stray = tmp_path / "stray.ckpt"
    assert training_arguments(command, [f"--ckpt_path={stray}"]) == ([f"--ckpt_path={stray}"], None)
    assert training_arguments("fit", given) == (given, None)


def test_a_run_that_is_resumed_becomes_its_config_and_last_checkpoint(run):
    flags, resumed = training_arguments("fit", ["--resume", str(run.path), "--epochs", "9"])
    assert flags == [f"--config={run.config}", "--trainer.max_epochs=9", f"--ckpt_path={run.last_checkpoint}"]
    assert resumed == run


@pytest.mark.parametrize(
    ("command", "more", "expected"),
    [
        ("fit", ["--config", "a.yaml"], "--config with --resume"),
        ("fit", ["--ckpt_path", "a.ckpt"], "--ckpt_path with --resume"),
        ("fit", ["--run_dir", "a"], "--run_dir with --resume"),
        ("fit", ["--init_weights", "a"], "--init_weights with --resume"),
        ("fit", ["--tune_lr"], "--tune_lr with --resume"),
        ("tune", [], "only fit resumes a run"),
    ],
)
def test_resume_goes_with_nothing_that_starts_a_new_run(run, command, more, expected):
    with pytest.raises(UserError, match=expected):
        training_arguments(command, ["--resume", str(run.path), *more])


def test_a_run_brings_its_own_config(run):
    with pytest.raises(UserError, match="--config with test"):
        training_arguments("test", [str(run.path), "--config", "a.yaml"])


def test_a_config_with_an_object_of_python_serves_where_one_is_given(run):
    run.config.write_text("model: {name: <Net>}")
    flags = [f"--config={run.config}"]
    with pytest.raises(UserError, match="its model <Net> is an object of Python"):
        training_arguments("fit", flags)
    assert training_arguments("fit", flags, ["model.name", "model.loss"]) == (flags, None)


def test_a_run_without_a_checkpoint_says_so(run):
    run.best_checkpoint.unlink()
    run.last_checkpoint.unlink()
    for command, arguments in (("test", [str(run.path)]), ("fit", ["--resume", str(run.path)])):
        with pytest.raises(UserError, match="no checkpoint found"):
            training_arguments(command, arguments)


# -- a whole story -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_new_user_trains_tests_looks_predicts_exports_and_trains_on(tmp_path):
    start("fit", *TINY, "--epochs", 2, "--lr", 0.01, cwd=tmp_path)
    run = RunFolder(tmp_path / "runs" / "smallnet" / "1")
    accuracy = json.loads(run.test_metrics.read_text())["accuracy"]
    message = f"Test accuracy {100 * accuracy:.2f} %"

    assert message in start("test", run.path, cwd=tmp_path).stdout
    assert message in start("analyze", run.path, cwd=tmp_path).stdout

    images = open_source("synthetic", "data", 16).load("test")
    for k in range(60):
        Image.fromarray(images.images[k]).save(tmp_path / f"image {k:02}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    done = start("predict-images", run.path, *names, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "broken.png" in done.stderr
    with open(tmp_path / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    predictions = np.load(run.predictions)
    expected = [str(predictions["class_names"][k]) for k in predictions["logits"][:60].argmax(1)]
    assert [row["class"] for row in rows] == expected
    refused = start("predict-images", run.path, names[1], cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert "--force" in refused.stderr

    exported = start("export", run.path, "--format", "onnx", "--probs", cwd=tmp_path)
    assert "all top-1 predictions equal" in exported.stdout
    assert (run.path / "model.onnx").stat().st_size > 1000

    done = start("fit", "--resume", run.path, "--epochs", 3, cwd=tmp_path)
    assert "epoch 3/3" in done.stdout
    assert [path.name for path in (tmp_path / "runs" / "smallnet").iterdir()] == ["1"]
    assert len(run.metrics_csv.read_text().splitlines()) == 4


def test_trained_weights_that_are_not_there_leave_no_run(monkeypatch, capsys, tmp_path):
    said = fail(monkeypatch, capsys, tmp_path, "fit", *TINY, "--model.pretrained", "nowhere.pt")
    assert "--model.pretrained nowhere.pt: no such file" in said


def test_shard_reads_numbers_as_fit_does(monkeypatch, capsys, tmp_path):
    seen = []
    monkeypatch.setattr(image_folder, "ClassFolders", lambda *roots, **settings: seen.append(settings))
    monkeypatch.setattr(shard_writer, "write_shards", lambda folders, output: [])
    flags = ["shard", "--data.root", "photos", "--output", "out"]
    assert run_command([*flags, "--data.image_size", "064", "--data.skip_unreadable", "true"]) == 0
    assert run_command(flags) == 0
    assert seen == [
        {"labels": None, "image_size": 64, "skip_unreadable": True},
        {"labels": None, "image_size": None},
    ]
