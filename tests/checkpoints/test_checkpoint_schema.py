"""A checkpoint from a stranger is read through a schema, restored or refused by name."""

import copy
import io
import os
import random
import re
import shutil

import pytest
import torch
from fitting import fit_run
from special_files import POSIX_KINDS, make_special

from benchmarks.faults.mutations import mutate_tree
from cifar_lightning import ImageClassifier, UserError
from cifar_lightning.checkpoints.checksum import add_checksum
from cifar_lightning.checkpoints.loading import load_weights, read_checkpoint, read_weights, statistics_of
from cifar_lightning.checkpoints.resume import stop_point
from cifar_lightning.checkpoints.schema import VERSION_KEY
from cifar_lightning.inference.trained_model import load_trained_model
from cifar_lightning.runs.environment import package_version
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.error_messages import restoring

SEED = int(os.environ.get("CIFAR_LIGHTNING_TEST_SEED", "0"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit_run(tmp_path_factory.mktemp("own") / "run", epochs=1)[0]


@pytest.fixture(scope="module")
def checkpoint(run):
    return run.best_checkpoint.read_bytes()


def load(data):
    return torch.load(io.BytesIO(data), weights_only=True)


def write(path, checkpoint):
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    path.write_bytes(add_checksum(buffer.getvalue()))


WRONG = [
    ("ImageDataModule.mean", [0.5, 0.5]),
    ("ImageDataModule.mean", "x"),
    ("ImageDataModule.std", [0.5, 0.5, 0.0]),
    ("ImageDataModule.std", [0.5, 0.5, float("nan")]),
    ("ImageDataModule.image_size", 5000),
    ("ImageDataModule.image_size", "16"),
    ("ImageDataModule.class_names", []),
    ("ImageDataModule.class_names", [1, 2]),
    ("ImageDataModule.class_names", ["ant"] * 10),
    ("hyper_parameters.memory_format", "nhwc"),
    ("ImageDataModule", None),
    ("hyper_parameters.name", 5),
    ("hyper_parameters.model_kwargs", [4]),
    ("hyper_parameters.tta", None),
    ("hyper_parameters", "x"),
    ("epoch", None),
    ("epoch", -1),
    ("global_step", "x"),
    ("state_dict", None),
    ("state_dict", {5: torch.zeros(1)}),
    ("optimizer_states", {}),
    ("loops", 5),
    ("cifar_lightning_epoch.lrs", {"first": 0.1}),
    ("cifar_lightning_epoch.lrs", {0: "high"}),
]


OF_SEVERAL_FIELDS = [[0.5, 0.5], ["ant"] * 10]  # these are wrong next to other values alone


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_of_another_type_or_size_is_refused_with_file_and_field(name, value, checkpoint, tmp_path):
    content = load(checkpoint)
    holder, (*parents, last) = content, name.split(".")
    for parent in parents:
        holder = holder[parent]
    holder[last] = value
    write(tmp_path / "best.ckpt", content)
    field = "ImageDataModule" if value in OF_SEVERAL_FIELDS else name
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'best.ckpt'}: damaged: {field}") + "[.:]") as refused:
        read_checkpoint(tmp_path / "best.ckpt")
    assert last.replace("_", " ") in str(refused.value).replace("_", " ")


def test_an_unknown_test_time_augmentation_is_refused(checkpoint, tmp_path):
    content = load(checkpoint)
    content["hyper_parameters"]["tta"] = ""
    other = RunFolder(tmp_path)
    other.best_checkpoint.parent.mkdir()
    write(other.best_checkpoint, content)
    with pytest.raises(UserError, match=re.escape(f"{other.best_checkpoint}: tta ")):
        load_trained_model(other)


@pytest.mark.parametrize("count", [(3,), -1, 2.0, "3", None, True])
@pytest.mark.parametrize("name", ["epoch_progress.current", "epoch_loop.batch_progress.total"])
def test_a_count_of_lightnings_loops_is_a_count(name, count, checkpoint, tmp_path):
    content = load(checkpoint)
    holder = content["loops"]["fit_loop"]
    for key in name.rsplit(".", 1):
        holder = holder[key]
    holder["completed"] = count
    write(tmp_path / "last.ckpt", content)
    with pytest.raises(UserError, match=f"damaged: loops: .*fit_loop.{name} has no counts"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_without_the_marks_of_a_run_a_file_is_only_weights(tmp_path):
    for content in ({"state_dict": 5}, {"state_dict": {1: torch.zeros(1)}}, {5: 6}, {"state_dict": {"a": "b"}}):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match=r"holds (no weights|a dict)"):
            read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("kind", [*POSIX_KINDS, "folder"])
@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors"])
def test_only_regular_files_are_read(kind, name, tmp_path):
    path = tmp_path / name
    make_special(path, kind)
    with pytest.raises(UserError, match="not a regular file"):
        read_weights(path)


def test_a_checkpoint_larger_than_the_memory_is_refused_at_once(tmp_path):
    with (tmp_path / "x.ckpt").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="too large"):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize("num_mutations", [50, pytest.param(500, marks=pytest.mark.slow(first=True))])
def test_any_mutation_is_read_or_refused(num_mutations, run, checkpoint):
    """CIFAR_LIGHTNING_TEST_SEED chooses other mutations."""
    rng, original, refusals, whole = random.Random(SEED), run.best_checkpoint, [], load(checkpoint)
    model = ImageClassifier(image_size=16, model_kwargs={"widths": [2, 2, 2], "dropout": 0.3}).model
    uses = (lambda: statistics_of(read_checkpoint(original)), lambda: load_weights(model, original))
    try:
        for _ in range(num_mutations):
            content = copy.deepcopy(whole)
            mutate_tree(content, rng)
            write(original, content)
            for use in (*uses, lambda: load_trained_model(run)):
                try:
                    use()
                except UserError as error:
                    refusals.append(str(error))
            run.last_checkpoint.rename(run.path / "kept")
            try:
                stop_point(run)
            except UserError as error:
                refusals.append(str(error))
            (run.path / "kept").rename(run.last_checkpoint)
    finally:
        original.write_bytes(checkpoint)
    assert len(refusals) > num_mutations // 4
    assert all(len(refusal.splitlines()) <= 3 for refusal in refusals)


def test_no_path_of_the_machine_is_in_a_checkpoint_and_the_version_is(run, tmp_path):
    for path in (run.best_checkpoint, run.last_checkpoint):
        content = load(path.read_bytes())
        assert content[VERSION_KEY] == package_version()
        assert str(run.path) not in repr({**content, "state_dict": None})
    assert str(run.path) not in run.environment.read_text() + run.split.read_text()


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_best_score_is_found_again_after_the_folder_moved_and_forgotten_without_the_file(run, tmp_path):
    moved = shutil.copytree(run.path, tmp_path / "moved")
    _, trainer = fit_run(moved, ckpt_path=moved / "checkpoints" / "last.ckpt", epochs=2)
    best = next(callback for callback in trainer.callbacks if "BestCheckpoint" in type(callback).__name__)
    assert best.best_model_path == str(moved / "checkpoints" / "best.ckpt")
    assert best.best_model_score is not None
    state = load((moved / "checkpoints" / "last.ckpt").read_bytes())["callbacks"][best.state_key]
    (moved / "checkpoints" / "best.ckpt").unlink()
    best.best_model_score = None
    best.load_state_dict(state)
    assert best.best_model_score is None


def test_what_restoring_raises_names_the_checkpoint_and_what_training_raises_does_not(tmp_path):
    def restore_training_state():
        raise KeyError("epoch_progress")

    with pytest.raises(UserError, match=r"last\.ckpt: .*KeyError: 'epoch_progress'"), restoring(tmp_path / "last.ckpt"):
        restore_training_state()
    for path in (None, tmp_path):
        with pytest.raises(KeyError), restoring(path):
            raise KeyError("training")
