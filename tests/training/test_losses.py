"""Losses of one's own: trained on, evaluated with, saved with their parameters; what is no loss is refused before."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from fitting import NARROW, Signal, fake_data, fit_run, last_checkpoint_of, quiet_trainer, small_data
from torch import nn

from benchmarks.faults.judge import differences
from cifar_lightning import ImageClassifier, UserError
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.losses import name_of
from cifar_lightning.training.signals import Stopped

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # of resumed runs
HERE = "tests.training.test_losses"
SETTINGS = {"image_size": 16, "model_kwargs": NARROW, "lr": 0.01}


class Focal(nn.Module):
    def __init__(self, gamma=2.0):
        super().__init__()
        self.gamma = gamma

    def forward(self, logits, labels):
        losses = F.cross_entropy(logits, labels, reduction="none")
        return ((1 - (-losses).exp()) ** self.gamma * losses).mean()


class Centers(nn.Module):
    """A parameter, a buffer that training changes, and dropout."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.centers = nn.Parameter(torch.zeros(num_classes))
        self.register_buffer("num_seen", torch.zeros(()))

    def forward(self, logits, labels):
        if self.training:
            self.num_seen += len(labels)
        return F.cross_entropy(F.dropout(logits, 0.1, self.training) + self.centers, labels)


def squared(logits, labels, scale=1.0):
    return scale * F.mse_loss(logits.softmax(1), F.one_hot(labels, logits.shape[1]).float())


@pytest.mark.parametrize(
    ("loss", "kwargs", "reference"),
    [
        ("torch.nn.CrossEntropyLoss", None, F.cross_entropy),
        ("torch.nn:MultiMarginLoss", {"margin": 0.5}, lambda x, y: F.multi_margin_loss(x, y, margin=0.5)),
        (f"{HERE}:Focal", {"gamma": 3.0}, Focal(3.0)),
        (f"{HERE}:squared", {"scale": 2.0}, lambda x, y: squared(x, y, 2.0)),
        (Focal, {"gamma": 3.0}, Focal(3.0)),
        (Focal(3.0), None, Focal(3.0)),
        (squared, None, squared),
    ],
)
def test_the_loss_is_trained_on_and_evaluated_with(tmp_path, loss, kwargs, reference):
    module, data = ImageClassifier(loss=loss, loss_kwargs=kwargs, **SETTINGS).eval(), small_data()
    batch = torch.randn(8, 3, 16, 16), torch.randint(0, 10, (8,))
    module.on_train_epoch_start()
    torch.testing.assert_close(module.training_step(batch, 0), reference(module(batch[0]), batch[1]))
    data.setup()
    module.prepare(data)
    logged = quiet_trainer(tmp_path, limit_val_batches=1).validate(module, data, verbose=False)[0]
    images, labels = next(iter(data.val_dataloader()))
    with torch.no_grad():
        assert logged["val/loss"] == pytest.approx(reference(module(images), labels).item(), rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"optimizer": "muon"}, {"layer_decay": 0.5, "freeze": "backbone"}])
def test_parameters_and_buffers_of_a_loss_are_trained_saved_and_resumed(tmp_path, settings):
    def start(name, *more, **kwargs):
        torch.manual_seed(0)
        module = ImageClassifier(loss=f"{HERE}:Centers", ema_decay=0.9, **SETTINGS, **settings)
        return fit_run(tmp_path / name, *more, module=module, epochs=1, **kwargs)

    unbroken, _ = start("unbroken")
    with pytest.raises(Stopped):
        start("stopped", Signal("on_train_batch_start", 5))
    stopped = RunFolder(tmp_path / "stopped")
    start("stopped", ckpt_path=stopped.last_checkpoint)
    result = last_checkpoint_of(unbroken)
    assert differences(result, last_checkpoint_of(stopped)) == []
    raw = result["current_model_state"]
    assert raw["loss_function.num_seen"] == 180
    assert raw["loss_function.centers"].abs().min() > 0
    assert result["hyper_parameters"]["loss"] is None, "load_from_checkpoint would import it"
    assert result["hyper_parameters"].keys() <= inspect.signature(ImageClassifier).parameters.keys()


@pytest.mark.parametrize(
    ("loss", "kwargs", "words"),
    [
        ("CrossEntropyLos", None, r"Did you mean torch\.nn\.CrossEntropyLoss"),
        ("cross_entrop", None, "Did you mean cross_entropy"),
        ("torch.nn.CrossEntropyLos", None, "Did you mean CrossEntropyLoss"),
        (f"{HERE}:focal", None, "Did you mean Focal"),
        (f"{HERE}:Focal", {"gama": 2}, "gama"),
        (f"{HERE}:HERE", None, "a str; give an nn.Module or a function"),
        ("cross_entropy", {"gamma": 2}, "takes none"),
        (None, None, "give loss="),
        (Focal(), {"gamma": 2}, "has its arguments already"),
    ],
)
def test_what_is_no_loss_is_refused(loss, kwargs, words):
    with pytest.raises(UserError, match=words):
        ImageClassifier(loss=loss, loss_kwargs=kwargs, **SETTINGS)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (nn.CrossEntropyLoss(reduction="none"), r"returns a tensor \(20,\)"),
        (lambda logits, labels: (logits - logits).sum() / 0, "is nan"),
        (lambda logits, labels: (logits.argmax(1) != labels).float().mean(), "no gradient"),
        (lambda logits, labels: torch.zeros((), requires_grad=True), "no gradient"),
        (lambda logits, labels: 0.5, "returns a float"),
        (lambda logits: logits.sum(), "TypeError"),
        (nn.BCEWithLogitsLoss(), "ValueError"),
    ],
)
def test_a_loss_that_does_not_work_is_refused_before_training(loss, words):
    state = torch.get_rng_state()
    module = ImageClassifier(loss=loss, **SETTINGS)
    torch.set_rng_state(state)
    with pytest.raises(UserError, match=words):
        module.prepare(None)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_only_cross_entropy_uses_is_refused():
    with pytest.raises(UserError, match=r"--model\.label_smoothing 0\.2"):
        ImageClassifier(loss=squared, label_smoothing=0.2, **SETTINGS)
    with pytest.raises(UserError, match=r"--data\.class_weights"):
        ImageClassifier(loss=squared, **SETTINGS).prepare(fake_data(class_weights=[1.0] * 10))
    with pytest.raises(UserError, match=r"probabilities.*\n.*--model\.mixup"):
        ImageClassifier(loss=squared, mixup=0.2, **SETTINGS).prepare(None)
    ImageClassifier(loss="torch.nn.CrossEntropyLoss", cutmix=1.0, label_smoothing=0.0, **SETTINGS).prepare(None)


def test_a_trial_leaves_the_loss_as_it_was():
    module = ImageClassifier(loss=Centers(), **SETTINGS)
    module.prepare(None)
    assert module.loss_function.num_seen == 0


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.parametrize("mixup", [0.0, 0.2])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, 10)), nn.CrossEntropyLoss()])
def test_a_loss_with_a_buffer_is_trained_and_evaluated_in_the_precision_of_the_module(tmp_path, precision, mixup, loss):
    module = ImageClassifier(loss=loss, mixup=mixup, **SETTINGS)
    settings = {"max_epochs": 1, "max_steps": 1, "limit_val_batches": 1, "num_sanity_val_steps": 1}
    trainer = quiet_trainer(tmp_path, precision=precision, **settings)
    trainer.fit(module, small_data())
    assert trainer.global_step == 1
    data = small_data()
    logged = quiet_trainer(tmp_path, precision=precision).validate(module, data, verbose=False)[0]
    module.model.eval()
    with torch.no_grad():
        batches = [(module(images.to(module.dtype)), labels) for images, labels in data.val_dataloader()]
    logits, labels = (torch.cat(each) for each in zip(*batches, strict=True))
    expected = F.cross_entropy(logits.double(), labels, None if loss.weight is None else loss.weight.double())
    assert logged["val/loss"] == pytest.approx(expected.item(), rel=0.02 if precision == "bf16-true" else 1e-6)


def test_a_loss_of_another_dtype_than_the_module_is_refused_before_training():
    weight = torch.ones(10, dtype=torch.float64)
    with pytest.raises(UserError, match=r"fails \(RuntimeError"):
        ImageClassifier(loss=nn.CrossEntropyLoss(weight=weight), **SETTINGS).prepare(None)


class Scaled:
    def __init__(self, by):
        self.by = by

    def compute(self, logits, labels):
        return self.by * F.cross_entropy(logits, labels)

    @classmethod
    def of_class(cls, logits, labels):
        return F.cross_entropy(logits, labels)


def test_only_what_its_path_makes_again_has_a_path():
    assert name_of(Scaled(2).compute) == "<compute>"
    assert name_of(Scaled.of_class).endswith(":Scaled.of_class")
    assert name_of(squared).endswith(":squared")
