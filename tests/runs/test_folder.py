import lzma
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cifar_lightning.errors import UserError
from cifar_lightning.runs.folder import RunFolder, _is_readable, config_name, create_run, open_run, weights_file
from cifar_lightning.runs.lock import RunLock
from cifar_lightning.runs.processes import announce_run, announced_run, is_started_from_outside

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and fork")


def start_run(base: Path, recipe: str = "smallnet", run_dir: Path | None = None) -> RunFolder:
    """Makes a run folder and lets go of it at once."""
    run = create_run(base, recipe, run_dir)
    assert run.lock is not None
    run.lock.release()
    return run


def finish(run: RunFolder) -> RunFolder:
    run.config.write_text("x: 1\n")
    run.checkpoints.mkdir(exist_ok=True)
    run.last_checkpoint.write_bytes(b"weights")
    return run


def test_each_start_gets_the_number_after_the_highest(tmp_path):
    assert start_run(tmp_path).path == tmp_path / "smallnet" / "1"
    (tmp_path / "smallnet" / "7").mkdir()
    (tmp_path / "smallnet" / "notes").mkdir()
    assert start_run(tmp_path).path == tmp_path / "smallnet" / "8"
    assert start_run(tmp_path, "other").path == tmp_path / "other" / "1"


def test_a_number_taken_between_looking_and_making_is_skipped(tmp_path, monkeypatch):
    start_run(tmp_path)
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(()))  # as seen before the other process made folder 1
    assert start_run(tmp_path).path == tmp_path / "smallnet" / "2"


def test_starts_at_the_same_time_never_share_a_folder(tmp_path):
    code = "import sys; from cifar_lightning.runs.folder import Path, create_run\n"
    code += "print(create_run(Path(sys.argv[1]), 'r').path)"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    paths = {process.communicate()[0].strip() for process in processes}
    assert paths == {str(tmp_path / "r" / str(number)) for number in range(1, 5)}


def test_a_chosen_folder_that_holds_a_checkpoint_is_refused_and_left_alone(tmp_path):
    run = finish(start_run(tmp_path, run_dir=tmp_path / "mine"))
    with pytest.raises(UserError, match=r"holds a run with checkpoints[\s\S]*--resume"):
        create_run(tmp_path, "smallnet", run.path)
    assert run.config.read_text() == "x: 1\n"
    assert run.last_checkpoint.read_bytes() == b"weights"


def test_a_finished_run_without_its_checkpoints_is_refused(tmp_path):
    run = start_run(tmp_path, run_dir=tmp_path / "mine")
    run.test_metrics.write_text("{}")
    with pytest.raises(UserError, match="holds a run with results"):
        create_run(tmp_path, "smallnet", run.path)
    assert run.test_metrics.exists()


def test_a_run_without_any_checkpoint_is_started_over_and_foreign_files_stay(tmp_path, capsys):
    run = start_run(tmp_path, run_dir=tmp_path / "mine")
    run.checkpoints.mkdir()
    own = [
        run.config,
        run.metrics_csv,
        run.path / "events.out.tfevents.1.host",
        run.path / ".split.json.1234abcd.tmp",
        run.checkpoints / ".last.ckpt.1234abcd.tmp",
    ]
    foreign = [run.path / "slurm-17.out", run.checkpoints / "notes.txt"]
    for file in (*own, *foreign):
        file.write_text("x")
    assert capsys.readouterr().out == ""
    start_run(tmp_path, run_dir=run.path)
    assert capsys.readouterr().out == f"{run.path}: held a run without a checkpoint, which is started over.\n"
    assert [file for file in own if file.exists()] == []
    assert all(file.exists() for file in foreign)


def test_a_folder_with_foreign_files_alone_is_used_and_they_stay(tmp_path):
    (tmp_path / "slurm-17.out").write_text("log")
    assert start_run(tmp_path, run_dir=tmp_path).path == tmp_path
    assert (tmp_path / "slurm-17.out").read_text() == "log"


def test_somebodys_own_config_is_never_overwritten(tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"would overwrite config\.yaml"):
        create_run(tmp_path, "smallnet", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    with pytest.raises(UserError):  # the first refusal did not mark the folder as a run's
        create_run(tmp_path, "smallnet", tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_a_file_in_the_way_is_a_user_error_of_two_lines(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--run_dir") as caught:
        create_run(tmp_path, "smallnet", tmp_path / "file")
    assert len(str(caught.value).splitlines()) <= 2


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("cifar_lightning.runs.folder.make_folder", refuse)
    with pytest.raises(UserError, match=r"--run_dir .*mine: cannot make this folder \(Permission denied\)"):
        create_run(tmp_path, "smallnet", tmp_path / "mine")


def test_a_second_writer_is_refused_until_the_first_lets_go(tmp_path):
    run = create_run(tmp_path, "smallnet")
    assert run.lock is not None
    run.config.touch()
    with pytest.raises(UserError, match=f"process {os.getpid()} is writing") as caught:
        open_run(run.path, lock=True)
    assert "--run_dir" not in str(caught.value)  # test, validate and fit --resume do not take it
    with pytest.raises(UserError, match=r"is writing(.|\n)*--run_dir"):
        create_run(tmp_path, "smallnet", run.path)
    assert run.config.exists()  # refused before anything was removed
    assert open_run(run.path).lock is None  # readers need none
    run.lock.release()
    run.lock.release()
    with RunLock(run.lock_file):
        pass
    second = open_run(run.path, lock=True)
    assert second.lock is not None
    second.lock.release()


@posix_only
def test_the_lock_dies_with_its_process_though_a_forked_child_lives_on(tmp_path):
    # The child waits on a pipe that this test holds, as a loader worker that has not yet seen its parent die.
    code = """
import os, sys, pathlib
from cifar_lightning.runs.folder import create_run
run = create_run(pathlib.Path(sys.argv[1]), "r")
ready, done = os.pipe()
if os.fork() == 0:
    os.write(done, b"x")
    sys.stdin.read()
    os._exit(0)
os.read(ready, 1)
print(run.path, flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lock_file = RunFolder(Path(process.stdout.readline().strip())).lock_file
        with pytest.raises(UserError, match=f"process {process.pid} is writing"):
            RunLock(lock_file)
        process.kill()
        process.wait()
        RunLock(lock_file).release()


def test_a_run_is_opened_again_also_after_it_was_copied(tmp_path):
    run = finish(start_run(tmp_path / "a"))
    copy = run.path.rename(tmp_path / "cöpy of run")
    assert open_run(copy) == RunFolder(copy)
    assert open_run(copy).last_checkpoint.read_bytes() == b"weights"


def test_what_is_not_a_run_is_named_with_what_is_missing_and_what_was_meant(tmp_path):
    run = finish(start_run(tmp_path))
    with pytest.raises(UserError, match="there is no such folder"):
        open_run(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        open_run(tmp_path / "empty")
    for given in (run.last_checkpoint, run.checkpoints, tmp_path, tmp_path / "smallnet"):
        with pytest.raises(UserError) as caught:
            open_run(given)
        assert str(run.path) + "?" in str(caught.value)
        assert len(str(caught.value).splitlines()) <= 2


def test_what_a_test_found_is_opened_without_config_only_where_it_is_enough(tmp_path):
    (tmp_path / "predictions.npz").touch()
    assert open_run(tmp_path, results=True) == RunFolder(tmp_path)
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        open_run(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        open_run(tmp_path / "empty", results=True)


def test_missing_files_are_named_with_the_command_that_makes_them(tmp_path):
    run = finish(start_run(tmp_path))
    run.require(run.config, run.last_checkpoint)
    with pytest.raises(UserError, match=r"predictions\.npz is missing[\s\S]*cifar-lightning test"):
        run.require(run.config, run.predictions)
    with pytest.raises(UserError, match=r"best\.ckpt is missing[\s\S]*fit"):
        run.require(run.best_checkpoint)


def test_folders_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    run.checkpoints.mkdir()
    run.check_writable()
    monkeypatch.setattr(os, "access", lambda path, mode: path != run.checkpoints)
    with pytest.raises(UserError, match=r"(?s)checkpoints cannot be written.*copy"):
        run.check_writable()


@pytest.mark.parametrize(
    ("configs", "model", "name"),
    [
        ([], "smallnet", "smallnet"),
        ([], "timm/resnet26d", "timm_resnet26d"),
        (["configs/smallnet_cpu.yaml"], "timm/resnet26d", "smallnet_cpu"),
        (["runs/mine/3/config.yaml"], "smallnet", "mine"),
    ],
)
def test_a_run_is_filed_under_its_config_or_its_model(configs, model, name):
    assert config_name(configs, model) == name


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2"}, True),
        ({"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "1"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # a shell of a SLURM job, without srun
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, False),  # Lightning's own launcher
    ],
)
def test_torchrun_and_slurm_are_distinguished_from_lightnings_own_launcher(monkeypatch, variables, expected):
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_started_from_outside() is expected


def test_further_processes_join_the_run_that_was_announced_before_the_one_that_was_given(monkeypatch, tmp_path):
    monkeypatch.delenv("CIFAR_LIGHTNING_RUN_DIR", raising=False)
    with pytest.raises(UserError, match="need one --run_dir"):
        announced_run(None)
    assert announced_run(tmp_path / "given") == tmp_path / "given"
    monkeypatch.setenv("CIFAR_LIGHTNING_RUN_DIR", "")  # so that the test's end removes what comes now
    announce_run(tmp_path / "announced")
    assert announced_run(tmp_path / "given") == tmp_path / "announced"


def test_the_first_of_several_makes_no_folder_that_the_others_cannot_know(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="need one --run_dir"):
        create_run(tmp_path, "smallnet")
    assert list(tmp_path.iterdir()) == []
    create_run(tmp_path, "smallnet", tmp_path / "mine").lock.release()


def test_a_run_stands_for_its_best_checkpoint_and_a_file_for_itself(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    with pytest.raises(UserError, match="is not a run folder"):
        weights_file(run.path)
    run.config.touch()
    with pytest.raises(UserError, match="missing"):
        weights_file(run.path)
    run.last_checkpoint.touch()
    assert weights_file(run.path) == run.last_checkpoint
    run.best_checkpoint.touch()
    assert weights_file(run.path) == run.best_checkpoint
    assert weights_file(run.best_checkpoint) == run.best_checkpoint


def test_a_result_that_zipfile_cannot_read_is_not_whole(tmp_path):
    path, name = tmp_path / "gallery.npz", "images.npy"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr(name, bytes(1000))
    assert _is_readable(path)
    data = bytearray(path.read_bytes())
    data[30 + len(name) + 4] = 0xFF  # LZMA's properties, after the header of the file in the archive
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive, pytest.raises(lzma.LZMAError):
        archive.testzip()
    assert not _is_readable(path)
