"""Durable checkpoints: written whole or not at all, never with NaN, verified when read."""

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fitting import checkpoint_of

from cifar_lightning import SmallNet, UserError, files
from cifar_lightning.checkpoints import loading
from cifar_lightning.checkpoints.durable import DurableCheckpointIO, newest_checkpoint
from cifar_lightning.checkpoints.loading import RESUME_STATE, UnreadableError, read_checkpoint
from cifar_lightning.errors import RunError
from cifar_lightning.runs import folder as runs
from cifar_lightning.runs.folder import RunFolder, create_run


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    DurableCheckpointIO().save_checkpoint(checkpoint_of(torch.ones(3)), path)
    return path


def test_a_checkpoint_is_read_back_and_no_temporary_file_is_left(path):
    assert DurableCheckpointIO().load_checkpoint(path)["state_dict"]["weight"].tolist() == [1, 1, 1]
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_failing_disk_is_reported_and_the_old_file_stays(path, monkeypatch, place):
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, place, full)
    with pytest.raises(RunError, match=r"(?s)last\.ckpt: cannot be written \(No space left.*--resume"):
        DurableCheckpointIO().save_checkpoint(checkpoint_of(torch.zeros(3)), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_failed_write_names_the_resume_command_only_where_there_is_a_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "my run" / "checkpoints" / "last.ckpt"
    io, nan = DurableCheckpointIO(), torch.tensor(float("nan"))
    monkeypatch.setattr(files.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for weight in (torch.zeros(3), nan):
        with pytest.raises(RunError) as failed:
            io.save_checkpoint(checkpoint_of(weight), path)
        assert "--resume" not in str(failed.value)
    (path.parent / "best.ckpt").touch()
    with pytest.raises(RunError) as failed:
        io.save_checkpoint(checkpoint_of(torch.zeros(3)), path)
    assert str(failed.value).endswith(f"then: cifar-lightning fit --resume '{tmp_path / 'my run'}'")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_with_nan_or_infinity_do_not_replace_a_checkpoint(path, bad):
    before = path.read_bytes()
    with pytest.raises(RunError, match="weight has NaN or infinity after step 7"):
        DurableCheckpointIO().save_checkpoint(checkpoint_of(torch.tensor([1.0, bad])), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("more", "name", "kind"),
    [
        ({"callbacks": {"Mine": {"best": np.float64(0.5)}, "Other": {"count": 1}}}, "Mine", "numpy"),
        ({"optimizer_states": [{"param_groups": [{"lr": np.float64(0.1)}]}]}, "optimizer_states", "numpy"),
        ({"lr_schedulers": [{"shape": checkpoint_of}]}, "lr_schedulers", "checkpoint_of"),
        ({"mine": Path("photo.jpg")}, "mine", "Path"),
    ],
)
def test_a_state_that_could_not_be_loaded_is_refused_when_it_is_first_saved(path, more, name, kind):
    before = path.read_bytes()
    with pytest.raises(RunError, match=rf"not written, as {name} has .*{kind}"):
        DurableCheckpointIO().save_checkpoint(checkpoint_of(torch.ones(3), **more), path)
    assert path.read_bytes() == before


def test_a_state_that_only_later_could_not_be_loaded_is_refused_then(path):
    io = DurableCheckpointIO()
    io.save_checkpoint(checkpoint_of(torch.ones(3), callbacks={"Mine": {"best": None}}), path)
    before = path.read_bytes()
    with pytest.raises(RunError, match="not written, as Mine has"):
        io.save_checkpoint(checkpoint_of(torch.ones(3), callbacks={"Mine": {"best": np.float64(0.5)}}), path)
    assert path.read_bytes() == before


def calls_while_writing(path, monkeypatch):
    """Return the calls that put a checkpoint in its place, in order, with the names of the files."""
    done = []
    for name in ("fsync", "link", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (done.append((name, args)), real(*args)))
    DurableCheckpointIO().save_checkpoint(checkpoint_of(torch.zeros(3)), path)
    return [f"{name} {Path(args[-1]).name.lstrip('.')[:8]}" if name != "fsync" else name for name, args in done]


def test_the_file_is_synced_before_the_rename_and_the_folder_after(path, monkeypatch):
    best = path.with_name("best.ckpt")
    assert calls_while_writing(best, monkeypatch) == ["fsync", "replace best.ckp", "fsync"]


def test_the_previous_checkpoint_is_replaced_only_after_the_new_one_is_synced(path, monkeypatch):
    expected = ["fsync", "link previous", "replace previous", "replace last.ckp", "fsync"]
    assert calls_while_writing(path, monkeypatch) == expected


def test_the_entries_of_new_folders_are_synced_in_the_folders_above_them(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    monkeypatch.setattr(runs, "sync_folder", synced.append)
    run = create_run(tmp_path / "runs", "smallnet", None)
    assert {tmp_path, tmp_path / "runs", tmp_path / "runs" / "smallnet"} <= set(synced)
    DurableCheckpointIO().save_checkpoint(checkpoint_of(torch.ones(1)), run.last_checkpoint)
    assert run.path in synced
    run.lock.release()


def test_each_of_200_damages_of_a_narrow_smallnet_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    weights = SmallNet(widths=(2, 2, 2)).state_dict()
    DurableCheckpointIO().save_checkpoint({"state_dict": weights, "global_step": 1, RESUME_STATE: {}}, path)
    whole, rng = path.read_bytes(), random.Random(0)
    for number in range(200):
        damaged = bytearray(whole)
        if number % 4 == 0:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            for _ in range(number % 4):
                damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            read_checkpoint(path)


def test_the_newest_intact_checkpoint_is_read(path):
    run = RunFolder(path.parent.parent)
    shutil.copy(path, run.previous_checkpoint)
    assert newest_checkpoint(run)[0] == run.last_checkpoint
    path.write_bytes(path.read_bytes()[:-1])
    newest, _, damages = newest_checkpoint(run)
    assert newest == run.previous_checkpoint
    assert [damaged for damaged, _ in damages] == [run.last_checkpoint]
    path.unlink()
    assert newest_checkpoint(run)[2] == [(run.last_checkpoint, f"{run.last_checkpoint} is missing.")]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (OSError(116, "Stale file handle"), "Stale file handle"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_an_unreadable_checkpoint_is_not_reported_as_damaged_nor_skipped(path, monkeypatch, error, reason):
    run = RunFolder(path.parent.parent)
    shutil.copy(path, run.previous_checkpoint)
    read = loading.read_bytes

    def fail(file, *arguments, **settings):
        if file == run.last_checkpoint:
            raise error
        return read(file, *arguments, **settings)

    monkeypatch.setattr(loading, "read_bytes", fail)
    with pytest.raises(UserError, match=rf"last\.ckpt: cannot be read \({reason}\)"):
        newest_checkpoint(run)


def test_too_little_memory_is_not_reported_as_damage(path, monkeypatch):
    def load(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(UnreadableError, match="not enough memory"):
        read_checkpoint(path)


# -- when last.ckpt is written ----------------------------------------------------------------------------------------


def test_only_weights_that_were_finite_at_the_start_must_be_so(tmp_path):
    io, path = DurableCheckpointIO(), tmp_path / "run" / "checkpoints" / "last.ckpt"
    mask = torch.full((2, 2), float("-inf")).triu(1)
    io.note_start({"weight": torch.ones(2), "mask": mask})
    state = {"weight": torch.ones(2), "mask": mask}
    io.save_checkpoint(checkpoint_of(torch.ones(2), state_dict=state), path)
    assert torch.equal(io.load_checkpoint(path)["state_dict"]["mask"], mask)
    with pytest.raises(RunError, match="weight has NaN or infinity"):
        io.save_checkpoint(checkpoint_of(torch.ones(2), state_dict={**state, "weight": mask}), path)
