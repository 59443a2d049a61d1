"""Frozen layers keep weights and statistics while they are frozen; a resume across their unfreezing is bit for bit."""

import lightning.pytorch as pl
import pytest
import torch
from fitting import NARROW, Signal, fit_run, last_checkpoint_of, quiet_trainer, small_data
from lightning.pytorch.callbacks import BaseFinetuning

from benchmarks.faults.judge import differences
from cifar_lightning import ImageClassifier, UserError
from cifar_lightning.checkpoints.loading import read_checkpoint
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.signals import Stopped

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # of resumed runs
SETTINGS = {"image_size": 16, "model_kwargs": NARROW, "lr": 0.01, "freeze": "backbone"}


class States(pl.Callback):
    """Keeps the weights and the modules in eval mode at the end of each epoch's training."""

    def __init__(self):
        self.weights, self.in_eval = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.train()  # as somebody's code may

    def on_train_epoch_end(self, trainer, pl_module):
        self.weights.append({name: value.clone() for name, value in pl_module.model.state_dict().items()})
        self.in_eval.append({name for name, module in pl_module.model.named_modules() if not module.training})


def changed(before, after):
    return {name.partition(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_frozen_layers_keep_weights_statistics_and_have_no_optimizer_state(tmp_path, optimizer):
    module, states = ImageClassifier(optimizer=optimizer, ema_decay=0.9, **SETTINGS), States()
    start = {name: value.clone() for name, value in module.model.state_dict().items()}
    run, _ = fit_run(tmp_path / "run", states, module=module, epochs=2)
    assert [changed(start, weights) for weights in states.weights] == [{"head"}, {"head"}]
    assert len(states.in_eval[0]) == 6
    assert changed(start, module.model.state_dict()) == {"head"}
    saved = read_checkpoint(run.last_checkpoint)
    assert len(saved["optimizer_states"][0]["state"]) == 2, "weight and bias of the head"
    for weights in (saved["state_dict"], saved["current_model_state"]):
        own = {name.removeprefix("model."): value for name, value in weights.items()}
        assert changed(start, own) == {"head"}


def test_unfrozen_layers_train_at_the_rate_of_the_schedule_with_their_statistics(tmp_path):
    module, states = ImageClassifier(unfreeze_epoch=1, **SETTINGS), States()
    start = {name: value.clone() for name, value in module.model.state_dict().items()}
    _, trainer = fit_run(tmp_path / "run", states, module=module, epochs=2)
    assert [changed(start, weights) for weights in states.weights] == [{"head"}, {"head", "features"}]
    assert [len(names) for names in states.in_eval] == [6, 0]
    assert len({group["lr"] for group in trainer.optimizers[0].param_groups}) == 1
    assert len(trainer.optimizers[0].state) == len([*module.parameters()])


@pytest.mark.parametrize(
    ("step", "settings"),
    [(4, {}), (9, {"optimizer": "sgd", "layer_decay": 0.5}), (13, {"optimizer": "muon", "ema_decay": 0.9})],
)
def test_a_resume_across_the_unfreezing_is_bit_for_bit(tmp_path, step, settings):
    def start(name, *more, **kwargs):
        torch.manual_seed(0)
        module = ImageClassifier(unfreeze_epoch=1, **{**SETTINGS, **settings})
        return fit_run(tmp_path / name, *more, module=module, epochs=2, **kwargs)

    unbroken, _ = start("unbroken")
    with pytest.raises(Stopped):
        start("stopped", Signal("on_train_batch_start", step))
    stopped = RunFolder(tmp_path / "stopped")
    start("stopped", ckpt_path=stopped.last_checkpoint)
    assert differences(last_checkpoint_of(unbroken), last_checkpoint_of(stopped)) == []
    assert unbroken.metrics_csv.read_bytes() == stopped.metrics_csv.read_bytes()


class Replaced(ImageClassifier):
    """Makes its model itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        convolution = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        self.model = torch.nn.Sequential(convolution, torch.nn.Flatten(), torch.nn.Linear(784, 10))


def test_layers_of_a_model_that_a_subclass_makes_are_frozen_and_unfrozen(tmp_path):
    module, states = Replaced(unfreeze_epoch=1, **SETTINGS), States()
    start = {name: value.clone() for name, value in module.model.state_dict().items()}
    fit_run(tmp_path / "run", states, module=module, epochs=2)
    assert [changed(start, weights) for weights in states.weights] == [{"2"}, {"0", "2"}]
    assert states.in_eval == [{"0.1"}, set()]


class Finetuning(BaseFinetuning):
    """Freezes all but the head, and adds it to the optimizer after an epoch, or never."""

    def __init__(self, unfreezes, **group):
        super().__init__()
        self.unfreezes, self.group = unfreezes, group

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.model.features, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1 and self.unfreezes:
            self.unfreeze_and_add_param_group(pl_module.model.features, optimizer)
            optimizer.param_groups[-1].update(self.group)


@pytest.mark.parametrize("schedule", ["one_cycle", "linear"])
@pytest.mark.parametrize("unfreezes", [True, False])
def test_lightnings_finetuning_may_freeze_and_is_refused_where_it_adds_to_our_schedule(tmp_path, schedule, unfreezes):
    module = ImageClassifier(image_size=16, model_kwargs=NARROW, schedule=schedule)
    trainer = quiet_trainer(tmp_path, max_epochs=2, limit_train_batches=2, callbacks=[Finetuning(unfreezes)])
    if unfreezes:
        with pytest.raises(UserError, match=r"unfreeze_epoch=.*configure_optimizers"):
            trainer.fit(module, small_data())
    else:
        trainer.fit(module, small_data())
    assert trainer.global_step == (2 if unfreezes else 4)


def test_a_group_that_one_cycle_can_step_is_trained(tmp_path):
    module = ImageClassifier(image_size=16, model_kwargs=NARROW)
    momenta = {"base_momentum": 0.85, "max_momentum": 0.95}
    callback = Finetuning(True, initial_lr=1e-4, max_lr=1e-3, min_lr=1e-6, **momenta)
    trainer = quiet_trainer(tmp_path, max_epochs=2, limit_train_batches=2, callbacks=[callback])
    trainer.fit(module, small_data())
    assert trainer.global_step == 4


def test_layers_are_unfrozen_only_where_some_are_frozen():
    with pytest.raises(UserError, match=r"--model\.unfreeze_epoch 2"):
        ImageClassifier(unfreeze_epoch=2)
