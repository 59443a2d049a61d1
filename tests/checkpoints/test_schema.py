"""Checkpoints of older versions: what is renamed, and that they are loaded and resumed as new ones."""

import pytest
import torch
from fitting import NARROW, Signal, fit_run, last_checkpoint_of, quiet_trainer, seed, small_data

from benchmarks.faults.judge import differences
from cifar_lightning import ImageClassifier
from cifar_lightning.checkpoints.durable import DurableCheckpointIO
from cifar_lightning.checkpoints.loading import load_weights, read_checkpoint
from cifar_lightning.checkpoints.resume import has_stopped
from cifar_lightning.checkpoints.schema import (
    LOGGED_METRICS,
    RESUME_STATE,
    SCHEMA_KEY,
    SCHEMA_VERSION,
    VERSION_KEY,
    check_checkpoint,
    upgrade_checkpoint,
)
from cifar_lightning.errors import UserError
from cifar_lightning.inference.trained_model import load_trained_model
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.signals import Stopped

# Lightning warns when resuming in the folder of a run.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def downgraded(checkpoint):
    """Return a checkpoint as version 1 wrote it."""
    old = {key: value for key, value in checkpoint.items() if key != SCHEMA_KEY}
    for key in {"state_dict", "current_model_state"} & old.keys():
        old[key] = {name.replace("model.", "network.", 1): tensor for name, tensor in old[key].items()}
    hparams = dict(old["hyper_parameters"])
    old["hyper_parameters"] = {"stem_share": hparams.pop("stem_train_fraction"), **hparams}
    return old


def save_downgraded(path):
    old = downgraded(read_checkpoint(path))
    assert any(name.startswith("network.") for name in old["state_dict"])
    DurableCheckpointIO().save_checkpoint(old, path)


def fit(path, *more, **kwargs):
    seed(0)
    module = ImageClassifier(image_size=16, model_kwargs=NARROW, stem_train_fraction=0.5, lr=0.01, ema_decay=0.9)
    return fit_run(path, *more, epochs=2, eval_batch_size=100, module=module, **kwargs)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("schema") / "run")


@pytest.mark.parametrize("schema", [99, "3", None])
def test_a_checkpoint_of_a_newer_schema_is_refused(schema, tmp_path):
    with pytest.raises(UserError, match=rf"new\.ckpt: written by cifar_lightning 9\.1, in schema {schema}"):
        check_checkpoint(tmp_path / "new.ckpt", {SCHEMA_KEY: schema, VERSION_KEY: "9.1"})
    check_checkpoint(tmp_path / "new.ckpt", {SCHEMA_KEY: SCHEMA_VERSION})


def test_an_old_checkpoint_is_upgraded_to_the_current_one(run):
    for path in (run.best_checkpoint, run.last_checkpoint):
        current = torch.load(path, weights_only=True)
        assert current[SCHEMA_KEY] == SCHEMA_VERSION
        assert "model.head.weight" in current["current_model_state"]
        assert current["hyper_parameters"]["stem_train_fraction"] == 0.5
        old = downgraded(current)
        kept = dict(old)
        assert differences(upgrade_checkpoint(old), current) == []
        assert old == kept, "the argument is not changed"
        assert upgrade_checkpoint(current) is current


def test_a_reason_to_stop_that_an_earlier_version_kept_over_a_resume_is_forgotten(run, tmp_path):
    for has_metrics in (True, False):
        checkpoint = read_checkpoint(run.last_checkpoint)
        checkpoint["callbacks"] = {"EarlyStopping": {"stopping_reason": 3, "wait_count": 0, "patience": 3}}
        if not has_metrics:
            del checkpoint[RESUME_STATE][LOGGED_METRICS]
        DurableCheckpointIO().save_checkpoint(checkpoint, tmp_path / "one.ckpt")
        assert has_stopped(read_checkpoint(tmp_path / "one.ckpt")["callbacks"]["EarlyStopping"]) is has_metrics


def test_files_of_other_programs_are_left_alone():
    plain = {"network.weight": torch.ones(1)}
    assert upgrade_checkpoint(plain) is plain
    assert upgrade_checkpoint({"pytorch-lightning_version": "2", "state_dict": 3})["state_dict"] == 3


def test_a_checkpoint_of_a_plain_trainer_has_a_version_and_an_old_one_is_loaded(tmp_path):
    module = ImageClassifier(image_size=16, model_kwargs=NARROW, lr=0.01)
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(module, small_data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    current = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert current[SCHEMA_KEY] == SCHEMA_VERSION
    old = downgraded(current)
    del old["hyper_parameters"]["stem_share"]  # Lightning ignores it, but not with the type checks of these tests
    torch.save(old, tmp_path / "old.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "old.ckpt", weights_only=True)
    assert torch.equal(loaded.model.head.weight, module.model.head.weight)
    load_weights(loaded.model, tmp_path / "old.ckpt")


def test_an_old_run_predicts_as_before(run, tmp_path):
    old = RunFolder(tmp_path / "old")
    old.checkpoints.mkdir(parents=True)
    old.best_checkpoint.write_bytes(run.best_checkpoint.read_bytes())
    save_downgraded(old.best_checkpoint)
    images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    assert torch.equal(load_trained_model(old).logits(images), load_trained_model(run).logits(images))


def test_an_old_run_with_ema_resumes_bit_for_bit(run, tmp_path):
    with pytest.raises(Stopped):
        fit(tmp_path / "run", Signal("on_train_batch_start", 12))
    old = RunFolder(tmp_path / "run")
    save_downgraded(old.last_checkpoint)
    fit(old.path, ckpt_path=old.last_checkpoint)
    assert differences(last_checkpoint_of(run), last_checkpoint_of(old)) == []
    assert old.metrics_csv.read_bytes() == run.metrics_csv.read_bytes()
