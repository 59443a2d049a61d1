"""EMA: the average itself, where it is used, and that a stopped run resumes with both sets of weights."""

import signal
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from fitting import NARROW, Signal, fit_run, quiet_trainer, small_data
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from test_resume_state import result_of, seed
from torch.optim.swa_utils import AveragedModel

from benchmarks.faults.judge import differences
from cifar_lightning import ImageClassifier, UserError
from cifar_lightning.checkpoints.loading import read_checkpoint
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.ema import EmaWeights
from cifar_lightning.training.signals import Stopped

# Lightning warns where it goes on in the folder of a run.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
DECAY = 0.8


class Watch(pl.Callback):
    """Notes the head's weights after each step and at each validation."""

    def __init__(self):
        self.raw, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.raw.append(pl_module.model.head.weight.detach().clone())

    def on_validation_batch_start(self, trainer, pl_module, *args):
        self.validated.append(pl_module.model.head.weight.detach().clone())


def module(**kwargs):
    seed(0)
    return ImageClassifier(image_size=16, model_kwargs=NARROW, lr=0.01, ema_decay=DECAY, **kwargs)


def start(path, *more, ckpt_path=None, **settings):
    made = module()
    seed(0 if ckpt_path is None else 1)  # a new process has other random states
    return fit_run(path, *more, module=made, epochs=3, eval_batch_size=250, ckpt_path=ckpt_path, **settings)[0]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return result_of(start(tmp_path_factory.mktemp("ema") / "run"))


def test_the_average_is_that_of_all_steps_with_a_decay_that_rises(tmp_path):
    watch = Watch()
    run = start(tmp_path / "run", watch)
    expected = watch.raw[0]
    for count, weights in enumerate(watch.raw[1:], start=1):
        decay = min(DECAY, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * weights
    checkpoint = read_checkpoint(run.last_checkpoint)
    torch.testing.assert_close(checkpoint["state_dict"]["model.head.weight"], expected)
    torch.testing.assert_close(checkpoint["current_model_state"]["model.head.weight"], watch.raw[-1])


def test_it_has_the_bits_of_torchs_averaged_model():
    class TwoTypes(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.norm, self.double = torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2).double()

    def average(averages, currents, count):
        averages_of = torch._foreach_lerp_ if averages[0].is_floating_point() else lambda a, c, _: a[0].copy_(c[0])
        averages_of(averages, currents, 1 - min(DECAY, (1 + int(count)) / (10 + int(count))))

    made, ema = TwoTypes(), EmaWeights(DECAY)
    ema._average_model = AveragedModel(made, use_buffers=True)
    reference = AveragedModel(made, multi_avg_fn=average, use_buffers=True)
    for step in range(1, 5):
        with torch.no_grad():
            made.norm(torch.randn(4, 3))
            for parameter in made.parameters():
                parameter += torch.randn_like(parameter)
        for _ in range(2):  # of a batch that makes no step
            ema.on_train_batch_end(SimpleNamespace(global_step=step), made, None, None, 0)
        reference.update_parameters(made)
        assert differences(dict(ema._average_model.state_dict()), dict(reference.state_dict())) == []


def test_a_validation_sees_the_average_and_training_continues_with_the_raw_weights(tmp_path):
    watch = Watch()
    run = start(tmp_path / "run", watch)
    best = read_checkpoint(run.tested_checkpoint)
    seen = [weights for weights in watch.validated if torch.equal(weights, best["state_dict"]["model.head.weight"])]
    assert seen  # what was measured is what is kept
    assert not any(torch.equal(weights, raw) for weights in watch.validated for raw in watch.raw)


@pytest.mark.parametrize(
    ("hook", "step"), [("on_train_batch_start", 4), ("on_validation_batch_start", 9), ("on_train_batch_start", 20)]
)
def test_a_run_stopped_anywhere_ends_as_an_unbroken_one(tmp_path, unbroken, hook, step):
    path = tmp_path / "run"
    with pytest.raises(Stopped):
        start(path, Signal(hook, step, signal.SIGTERM))
    run = RunFolder(path)
    start(path, ckpt_path=run.last_checkpoint)
    assert differences(result_of(run), unbroken) == []


def test_in_double_precision_the_average_is_double_too_and_resumes_to_the_bit(tmp_path):
    settings = {"trainer": {"precision": "64-true"}}
    unbroken = result_of(start(tmp_path / "unbroken", **settings))
    run = RunFolder(tmp_path / "run")
    with pytest.raises(Stopped):
        start(run.path, Signal("on_train_batch_start", 12, signal.SIGTERM), **settings)
    start(run.path, ckpt_path=run.last_checkpoint, **settings)
    assert differences(result_of(run), unbroken) == []
    for state in ("state_dict", "current_model_state"):
        assert unbroken["last.ckpt"][state]["model.head.weight"].dtype == torch.float64


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_of_half_precision_are_not_averaged(tmp_path, precision):
    with pytest.raises(UserError, match=rf"--model.ema_decay {DECAY} with --trainer.precision {precision}"):
        start(tmp_path / "run", trainer={"precision": precision})


def test_a_test_after_training_uses_the_average_without_a_warning(tmp_path):
    made = module()
    run, trainer = fit_run(tmp_path / "run", module=made, eval_batch_size=250)
    made.model.head.weight.data.zero_()
    trainer.test(made, trainer.datamodule, ckpt_path=run.last_checkpoint, weights_only=True, verbose=False)
    average = read_checkpoint(run.last_checkpoint)["state_dict"]["model.head.weight"]
    assert torch.equal(made.model.head.weight, average)


def test_a_checkpoint_of_weights_alone_holds_the_average_that_was_validated(tmp_path):
    settings = {"save_top_k": -1, "save_weights_only": True, "enable_version_counter": False}
    run = start(tmp_path / "run", ModelCheckpoint(tmp_path / "more", filename="{epoch}", **settings))
    alone, whole = (read_checkpoint(path) for path in (tmp_path / "more" / "epoch=2.ckpt", run.last_checkpoint))
    assert alone["state_dict"].keys() == whole["state_dict"].keys()
    assert all(torch.equal(tensor, whole["state_dict"][name]) for name, tensor in alone["state_dict"].items())
    assert not torch.equal(alone["state_dict"]["model.head.weight"], whole["current_model_state"]["model.head.weight"])


def test_another_module_of_the_same_trainer_has_its_own_weights_and_no_average(tmp_path):
    averaged, other = module(), ImageClassifier(image_size=16, model_kwargs=NARROW, lr=0.01)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(averaged, small_data())
    trainer.validate(other, small_data(), verbose=False)
    expected = quiet_trainer(tmp_path).validate(other, small_data(), verbose=False)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(expected[0]["val/loss"])
    trainer.fit_loop.max_epochs = 2
    trainer.fit(other, small_data())
    assert not any(isinstance(callback, EmaWeights) for callback in trainer.callbacks)


def test_weights_of_an_average_are_left_where_another_lightning_module_is_validated(tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module(), small_data())
    other = BoringModel()
    before = other.layer.weight.detach().clone()
    seen = []
    other.on_validation_batch_start = lambda *args: seen.append(torch.equal(other.layer.weight, before))
    trainer.validate(other, verbose=False)
    assert seen
    assert all(seen)


class Own(ImageClassifier):
    """Has callbacks of its own, and none of those that average."""

    def configure_callbacks(self):
        return [pl.Callback()]


def test_a_subclass_that_leaves_the_average_out_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"configure_callbacks.*super"):
        fit_run(tmp_path, module=Own(image_size=16, model_kwargs=NARROW, ema_decay=0.9))


def test_without_a_decay_there_is_no_average():
    for classifier, has_average in ((ImageClassifier(image_size=16, model_kwargs=NARROW), False), (module(), True)):
        classifier.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        assert sum(isinstance(callback, EmaWeights) for callback in classifier.configure_callbacks()) == has_average
