"""What does not agree between network and data is said before the first step, or in it."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from fitting import fake_data, quiet_trainer, small_data
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities.types import LRSchedulerConfig
from program import REPO, start
from torch import nn

from cifar_lightning import ImageClassifier, UserError
from cifar_lightning.models.smallnet import SmallNet
from cifar_lightning.training.error_messages import explained
from cifar_lightning.training.model_checks import (
    are_log_probs,
    are_probabilities,
    check_batches,
    check_image_size,
    check_logits,
    check_optimizers,
    check_schedules,
)

DEEP = SmallNet(widths=(2,) * 5)  # 16 pixels halved four times: BatchNorm sees one value of each image
SHALLOW = SmallNet(widths=(2, 2))


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(2, 7), r"returns \(2, 7\) for 2 images of 4 classes"),
        (torch.zeros(2, 4, 8, 8), r"returns \(2, 4, 8, 8\) for 2 images of 4 classes"),
        (torch.zeros(1, 4), r"returns \(1, 4\) for 2 images"),
        ((torch.zeros(2, 4), None), "returns a tuple, not a tensor"),
        ({"logits": torch.zeros(2, 4)}, "returns a dict, not a tensor"),
    ],
)
def test_what_is_no_logits_is_described(logits, message):
    check_logits(torch.zeros(2, 4), 2, 4)
    with pytest.raises(UserError, match=message):
        check_logits(logits, 2, 4)


def test_softmax_outputs_are_recognized_and_raw_logits_are_not():
    logits = torch.randn(64, 4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert are_probabilities(logits.softmax(1).to(dtype))
        assert are_log_probs(torch.zeros(8, 1000, dtype=dtype).log_softmax(1))  # all rounded alike
        assert are_log_probs((100 * logits).to(dtype).log_softmax(1))
    for raw in (logits, logits.abs(), logits.log_softmax(1), logits.sigmoid(), torch.zeros(64, 4), logits * torch.nan):
        assert not are_probabilities(raw)
    for raw in (logits, logits.softmax(1), torch.zeros(64, 4)):
        assert not are_log_probs(raw)


LAST = [nn.Softmax(1), nn.Identity(), nn.LogSoftmax(1)]


@pytest.mark.parametrize(
    ("loss", "remarks"),
    [
        ({}, [1, 0, 0]),
        ({"loss": "torch.nn.CrossEntropyLoss"}, [1, 0, 0]),
        ({"loss": lambda logits, labels: nn.functional.cross_entropy(logits, labels) ** 2}, [1, 0, 0]),
        ({"loss": "torch.nn.NLLLoss"}, [1, 1, 0]),
        ({"loss": nn.functional.nll_loss, "loss_kwargs": {"ignore_index": 3}}, [1, 1, 0]),
    ],
    ids=["cross_entropy", "CrossEntropyLoss", "of one's own", "NLLLoss", "nll_loss"],
)
def test_a_model_that_ends_in_a_softmax_or_lacks_that_of_its_loss_is_remarked_on_once(loss, remarks, tmp_path, capsys):
    words = "log-probabilities, which" if "nll" in str(loss).lower() else "probabilities, not raw logits"
    for last, expected in zip(LAST, remarks, strict=True):
        module = ImageClassifier(model=nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10), last), **loss)
        quiet_trainer(tmp_path, max_epochs=2, limit_train_batches=2, limit_val_batches=0).fit(module, small_data())
        printed = capsys.readouterr().out
        assert printed.count("warning:") == printed.count(words) == expected, last


@pytest.mark.parametrize(
    ("name", "made_for", "of_data", "is_remarked"),
    [
        ("resnet18", 32, 224, True),
        ("resnet18", 32, 48, False),
        ("vit_tiny", 32, 224, True),
        ("vit_tiny", 224, 256, True),
        ("smallnet", 32, 224, False),
    ],
)
def test_a_model_that_has_other_layers_for_the_images_of_the_data_is_remarked_on(
    name, made_for, of_data, is_remarked, capsys
):
    module = ImageClassifier(name, image_size=made_for)
    trainer = SimpleNamespace(datamodule=fake_data(image_size=of_data))
    check_image_size(trainer, module.model, module._architecture)
    assert (f"give ImageClassifier(image_size={of_data})" in capsys.readouterr().out) is is_remarked
    module.model.head = nn.Linear(2, 2)  # changed since
    check_image_size(trainer, module.model, module._architecture)
    assert capsys.readouterr().out == ""


class Fails(nn.Module):
    """Raises an error in the batch of a number."""

    def __init__(self, batch, error):
        super().__init__()
        self.head, self.num_left, self.error = nn.Linear(3 * 16 * 16, 10), batch, error

    def forward(self, images):
        self.num_left -= 1
        if self.num_left < 0:
            raise self.error
        return self.head(images.flatten(1))


def fit_model(model, tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=0, num_sanity_val_steps=0)
    trainer.fit(ImageClassifier(model=model, image_size=16), small_data())


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 10)),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 10)),
        nn.Sequential(nn.Conv2d(3, 10, 17), nn.Flatten()),
    ],
    ids=["image size", "channels", "filter size"],
)
def test_a_model_that_does_not_fit_the_first_batch_is_refused_by_its_shape(model, tmp_path):
    with pytest.raises(UserError, match=r"Sequential, does not fit 3-channel images of 16 pixels \(.+\)") as refused:
        fit_model(model, tmp_path)
    assert isinstance(refused.value.__cause__, RuntimeError)


class Skips(nn.Module):
    """Adds channels that do not fit."""

    def forward(self, images):
        return images + images[:, :2]


def test_the_line_of_a_model_that_fails_in_the_first_batch_is_named(tmp_path):
    with pytest.raises(UserError, match=r"test_model_checks\.py, line \d+"):
        fit_model(nn.Sequential(Skips(), nn.Flatten(), nn.Linear(768, 10)), tmp_path)


@pytest.mark.parametrize(
    ("batch", "error"),
    [
        (0, NotImplementedError("Could not run 'my::scan' with arguments from the 'CPU' backend.")),
        (0, RuntimeError("view size is not compatible with input tensor's size and stride")),
        (0, RuntimeError("Invalid buffer size: 19.45 GB")),
        (1, RuntimeError("mat1 and mat2 shapes cannot be multiplied")),
    ],
    ids=["no kernel", "view", "out of memory", "later batch"],
)
def test_other_errors_of_a_model_and_those_of_later_batches_stay_as_they_are(batch, error, tmp_path):
    with pytest.raises(type(error)) as raised:
        fit_model(Fails(batch, error), tmp_path)
    assert raised.value is error


class NoOptimizer(ImageClassifier):
    def configure_optimizers(self):
        return None


class VectorLoss(ImageClassifier):
    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels, reduction="none")


@pytest.mark.filterwarnings("ignore:.*will run with no optimizer")  # which is tested
@pytest.mark.parametrize(
    ("kind", "message"),
    [(NoOptimizer, "returns no optimizer"), (VectorLoss, r"a loss of shape \(\d+,\)")],
)
def test_a_subclass_without_an_optimizer_or_with_several_losses_ends_in_a_sentence(kind, message, tmp_path):
    data = small_data()
    with pytest.raises(UserError, match=message):
        quiet_trainer(tmp_path, max_epochs=1).fit(kind(image_size=16, model_kwargs={"widths": [2, 2]}), datamodule=data)


class OwnSchedule(ImageClassifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize(
    ("callback", "way_out"),
    [
        (BatchSizeFinder(init_val=4, steps_per_trial=1, max_trials=1), "scale_batch_size before fit"),
        (LearningRateFinder(num_training_steps=2), "lr_find before fit"),
        (GradientAccumulationScheduler({1: 3}), "accumulate_grad_batches"),
        (GradientAccumulationScheduler({0: 2}), "accumulate_grad_batches"),
    ],
)
def test_callbacks_that_change_the_steps_of_our_schedule_are_refused_in_any_trainer(callback, way_out, tmp_path):
    settings = {"image_size": 16, "model_kwargs": {"widths": [2, 2]}}
    with pytest.raises(UserError, match=f"{type(callback).__name__}: .*{way_out}"):
        quiet_trainer(tmp_path, max_epochs=2, callbacks=[callback]).fit(ImageClassifier(**settings), small_data())


def test_a_schedule_of_ones_own_takes_them(tmp_path):
    run = quiet_trainer(tmp_path, max_epochs=2, callbacks=[GradientAccumulationScheduler({1: 3})])
    run.fit(OwnSchedule(image_size=16, model_kwargs={"widths": [2, 2]}), small_data())
    assert run.global_step == 9 + 3


class TwoOptimizers(ImageClassifier):
    def configure_optimizers(self):
        return [torch.optim.SGD([parameter], lr=0.1) for parameter in [*self.parameters()][:2]]


def test_several_optimizers_end_in_a_sentence(tmp_path):
    module = TwoOptimizers(image_size=16, model_kwargs={"widths": [2, 2]})
    with pytest.raises(UserError, match="configure_optimizers returns several"), explained("fit"):
        quiet_trainer(tmp_path, max_epochs=1).fit(module, datamodule=small_data())


CONTIGUOUS = nn.Linear(2, 2)
LBFGS = torch.optim.LBFGS(CONTIGUOUS.parameters())
FUSED = torch.optim.AdamW(CONTIGUOUS.parameters(), fused=True)
HALF, BFLOAT16 = MixedPrecision("16-mixed", "cuda", scaler=object()), MixedPrecision("bf16-mixed", "cpu")


class OwnClipping(pl.LightningModule):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)


@pytest.mark.parametrize(
    ("optimizer", "settings", "message"),
    [
        (LBFGS, {}, None),
        (LBFGS, {"accumulate_grad_batches": 2}, r"--trainer\.accumulate_grad_batches 2: LBFGS"),
        (LBFGS, {"precision_plugin": HALF}, r"--trainer\.precision 16-mixed: LBFGS"),
        (LBFGS, {"precision_plugin": BFLOAT16}, None),
        (FUSED, {"accumulate_grad_batches": 2, "precision_plugin": HALF}, None),
        (FUSED, {"gradient_clip_val": 1.0}, None),
        (FUSED, {"gradient_clip_val": 1.0, "precision_plugin": HALF}, r"gradient_clip_val 1\.0: .*16-mixed.*fused"),
        (FUSED, {"gradient_clip_val": 1.0, "precision_plugin": BFLOAT16}, r"gradient_clip_val 1\.0: .*bf16-.*fused"),
        (FUSED, {"gradient_clip_val": 1.0, "precision_plugin": BFLOAT16, "lightning_module": OwnClipping()}, None),
    ],
)
def test_an_optimizer_that_cannot_do_what_the_trainer_asks_is_refused_before_training(optimizer, settings, message):
    given = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "precision_plugin": Precision()}
    given |= {"lightning_module": pl.LightningModule()} | settings
    trainer = SimpleNamespace(optimizers=[optimizer], **given)
    if message is None:
        check_optimizers(trainer, CONTIGUOUS)
        return
    with pytest.raises(UserError, match=message):
        check_optimizers(trainer, CONTIGUOUS)


def trainer_with(scheduler, max_epochs=3, max_steps=-1, validates=(1.0, 1), **config):
    interval, every = validates
    limits = {"max_epochs": max_epochs, "max_steps": max_steps, "num_training_batches": 9}
    limits |= {"val_check_interval": interval, "check_val_every_n_epoch": every}
    return SimpleNamespace(lr_scheduler_configs=[LRSchedulerConfig(scheduler, **config)], **limits)


@pytest.mark.parametrize(
    ("total_steps", "settings", "allowed"),
    [
        (26, {"interval": "step"}, None),
        (27, {"interval": "step"}, 27),
        (13, {"interval": "step", "frequency": 2}, 13),
        (2, {}, None),
        (3, {}, 3),
        (2, {"max_steps": 5}, 0),  # in an epoch or more: not known
        (2, {"max_epochs": -1, "interval": "step"}, 0),  # max_time ends it
    ],
)
def test_a_one_cycle_of_ones_own_that_ends_before_the_run_is_refused(total_steps, settings, allowed):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    trainer = trainer_with(torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=total_steps), **settings)
    if allowed is not None:
        check_schedules(trainer, lambda: 27)
        return
    with pytest.raises(UserError, match=f"total_steps={total_steps}.* give total_steps={total_steps + 1}"):
        check_schedules(trainer, lambda: 27)


def test_a_plateau_that_steps_before_its_metric_is_there_is_refused():
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    settings = {"reduce_on_plateau": True, "monitor": "val/loss"}
    check_schedules(trainer_with(plateau, **settings), lambda: 27)
    with pytest.raises(UserError, match=r"val/loss.*interval epoch"):
        check_schedules(trainer_with(plateau, interval="step", **settings), lambda: 27)


@pytest.mark.parametrize(
    ("validates", "settings", "is_refused"),
    [
        ((10, None), {}, True),
        ((9, None), {}, False),
        ((9, 1), {}, False),
        ((10, None), {"frequency": 2}, False),
        ((19, None), {"frequency": 2}, True),
        ((10, None), {"monitor": "train/loss"}, False),
        ((10, None), {"strict": False}, False),
    ],
)
def test_a_plateau_that_steps_before_the_first_validation_is_refused(validates, settings, is_refused):
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    settings = {"reduce_on_plateau": True, "monitor": "val/acc", **settings}
    trainer = trainer_with(plateau, validates=validates, **settings)
    if not is_refused:
        check_schedules(trainer, lambda: 27)
        return
    with pytest.raises(UserError, match=rf"val_check_interval {validates[0]}: ReduceLROnPlateau monitors val/acc"):
        check_schedules(trainer, lambda: 27)
    del trainer.val_check_interval  # as Lightning does for a duration
    check_schedules(trainer, lambda: 27)


@pytest.mark.parametrize(
    ("num_outputs", "num_classes", "message"),
    [(7, 10, r"returns \(\d+, 7\) for \d+ images of 10 classes"), (4, 4, "num_classes 4: the data has 10 classes")],
)
def test_a_model_of_other_outputs_or_classes_ends_in_a_sentence(tmp_path, num_outputs, num_classes, message):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_outputs))
    module = ImageClassifier(model=model, num_classes=num_classes)
    with pytest.raises(UserError, match=message):
        quiet_trainer(tmp_path, max_epochs=1).fit(module, small_data())


def trainer(batch_size, num_images=101, world_size=1, limit=1.0, drop_last=False, max_steps=-1):
    step = batch_size * world_size
    batches = num_images // step if drop_last else -(-num_images // step)
    data = fake_data(
        num_train_batches=lambda num_ranks: batches,
        num_images=lambda part: num_images,
        batch_size=batch_size,
        train_sizes=(16,),
    )
    return SimpleNamespace(
        datamodule=data,
        world_size=world_size,
        limit_train_batches=limit,
        max_steps=max_steps,
        accumulate_grad_batches=1,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 1}, r"--batch_size 1: .*give 2 or more"),
        ({"batch_size": 25, "max_steps": 5}, "of 101 .* the last batch has 1"),
        ({"batch_size": 25}, r"--batch_size 25: of 101 .* the last batch has 1, .*--data\.drop_last true"),
        ({"batch_size": 49, "world_size": 2}, "the last batch has 3 over 2 processes"),
    ],
)
def test_a_batch_of_one_image_is_refused_where_batchnorm_cannot_take_it(settings, message):
    with pytest.raises(UserError, match=message):
        check_batches(trainer(**settings), DEEP)
    check_batches(trainer(**settings), SHALLOW)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 25, "drop_last": True},
        {"batch_size": 25, "limit": 4},
        {"batch_size": 25, "max_steps": 3},
        {"batch_size": 24},
        {"batch_size": 101},
        {"batch_size": 97, "world_size": 1},
        {"batch_size": 48, "world_size": 2},
    ],
)
def test_batches_of_more_are_taken(settings):
    check_batches(trainer(**settings), DEEP)


def test_a_last_batch_of_one_image_ends_no_epoch(tmp_path):
    """As in the loader: of 101 images in batches of 25 the last has one."""
    data = small_data(limit=112, batch_size=25)
    with pytest.raises(UserError, match=r"--batch_size 25: of 101 .* last batch has 1"):
        quiet_trainer(tmp_path, max_epochs=1).fit(ImageClassifier(model=SmallNet(widths=(2,) * 5)), data)


GIVEN = """
from torch import nn
from cifar_lightning import ImageClassifier, UserError

class Net(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)), images

for given in ({"model": Net}, {"model": "resnet18"}, {"model_kwargs": "widths=8"}):
    try:
        ImageClassifier(**given)
    except UserError as error:
        print(error)
try:
    import torch
    ImageClassifier(model=Net(), num_classes=3)(torch.zeros(2, 3, 4, 4))
except UserError as error:
    print(error)
"""


def test_what_is_no_module_is_refused(tmp_path):
    # A process of its own: the tests' check of types would refuse it before.
    (tmp_path / "given.py").write_text(GIVEN, encoding="utf-8")
    done = start(program=tmp_path / "given.py", cwd=tmp_path, PYTHONPATH=str(REPO))
    expected = [["model=Net:", "model=Net(...)"], ["model: a str", "nn.Module"]]
    expected += [["--model.model_kwargs widths=8:", "{widths: "], ["a tuple, not a tensor", "forward"]]
    lines = done.stdout.splitlines()
    for line, words in zip(lines, expected, strict=True):
        assert [word for word in words if word not in line] == [], done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "resnet18"}, r"name='resnet18': .*model="),
        ({"pretrained": True}, r"pretrained=True: .*model="),
        ({"model_kwargs": {"depth": 2}}, r"model_kwargs=.*depth.*: .*model="),
    ],
)
def test_nothing_that_makes_a_model_by_name_is_ignored_with_a_given_model(given, message):
    with pytest.raises(UserError, match=message):
        ImageClassifier(model=nn.Flatten(), **given)


@pytest.mark.parametrize("layer", [nn.LazyLinear(10), nn.LazyBatchNorm1d(affine=False)])
def test_lazy_layers_are_refused_until_the_model_was_called(layer):
    model = nn.Sequential(nn.Flatten(), layer)
    with pytest.raises(
        UserError, match=r"Sequential has lazy layers.* model\(torch\.zeros\(2, 1, 16, 16\)\), or .*--model\.name"
    ):
        ImageClassifier(model=model, image_size=16, in_channels=1)
    model(torch.zeros(2, 1, 16, 16))
    ImageClassifier(model=model, image_size=16, in_channels=1)


def test_a_model_of_ones_own_is_given_again_to_its_checkpoint(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    run = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1)
    run.fit(ImageClassifier(model=model), small_data())
    run.save_checkpoint(tmp_path / "one.ckpt")
    other = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    ImageClassifier.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True, model=other)
    assert torch.equal(other[1].weight, model[1].weight)
    with pytest.raises(UserError, match=r"give model=\.\.\. "):
        ImageClassifier.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)


TINY_MODEL = {"image_size": 16, "model_kwargs": {"widths": [2, 2]}}


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_data_with_more_classes_than_the_model_is_refused_before_its_evaluation(stage, tmp_path):
    module = ImageClassifier(num_classes=4, **TINY_MODEL)
    with pytest.raises(UserError, match="num_classes 4: the data has 10"):
        getattr(quiet_trainer(tmp_path), stage)(module, datamodule=small_data(), verbose=False)


class OnPlateau(ImageClassifier):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)  # none is better
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}


def test_a_plateau_schedule_takes_a_step_for_each_validation(tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=5, limit_train_batches=1, check_val_every_n_epoch=2)
    trainer.fit(OnPlateau(**TINY_MODEL), datamodule=small_data())
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 2  # validated after epochs 2 and 4
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)
