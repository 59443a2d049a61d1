"""ImageClassifier in a real Trainer: loss, sums, metrics, steps, precision of its figures."""

import itertools

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fitting import SPEED, fake_data, quiet_trainer, small_data
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_f1_score

from cifar_lightning import ImageClassifier, UserError
from cifar_lightning.models.registry import build_model
from cifar_lightning.models.speednet import WhiteningConv
from cifar_lightning.training.model_checks import unpack_batch
from cifar_lightning.training.predictions import PredictionWriter
from cifar_lightning.training.tta import tta_logits
from cifar_lightning.training.whitening_stem import whiten
from cifar_lightning.transforms.mixup import Mixing

NARROW = {"widths": [4, 8, 8], "dropout": 0.0}


def test_the_training_loss_is_label_smoothed_cross_entropy():
    module = ImageClassifier(label_smoothing=0.2, model_kwargs=NARROW)
    batch = torch.randn(8, 3, 16, 16), torch.randint(0, 10, (8,))
    module.eval()  # BatchNorm by running statistics, so that a second pass is the same
    module.on_train_epoch_start()
    got = module.training_step(batch, 0)
    log_probs = module(batch[0]).log_softmax(1)
    smoothed = 0.8 * F.one_hot(batch[1], 10) + 0.2 / 10
    torch.testing.assert_close(got, -(smoothed * log_probs).sum(1).mean())


class Losses(pl.Callback):
    """Keeps the batches of an epoch and their losses."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((outputs["loss"].item(), batch))


def test_class_weights_of_the_data_weigh_the_loss(tmp_path):
    module = ImageClassifier(image_size=16, lr=1e-9, label_smoothing=0.1, model_kwargs=NARROW)
    data, losses = small_data(class_weights="balanced", limit=999), Losses()
    run = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1, callbacks=[losses])
    run.fit(module, data)
    (loss, (images, targets)), weights = losses.seen[0], torch.tensor(data.class_weights)
    assert weights.unique().numel() > 1
    logits = module.train()(images)  # BatchNorm by the batch, whose weights a rate of 1e-9 has not moved
    expected = F.cross_entropy(logits, targets, weight=weights, label_smoothing=0.1)
    assert loss == pytest.approx(expected.item(), rel=1e-4)


def test_mixed_images_are_trained_on_with_smoothed_targets():
    torch.manual_seed(0)
    module = ImageClassifier(label_smoothing=0.2, mixup=1.0, model_kwargs=NARROW).eval()
    images, targets = torch.randn(8, 3, 16, 16), torch.randint(0, 10, (8,))
    module.on_train_epoch_start()
    torch.manual_seed(1)
    got = module.training_step((images, targets), 0)
    torch.manual_seed(1)
    mixed, shares = Mixing(10, mixup=1.0)(images, targets)
    smoothed = 0.8 * shares + 0.2 / 10
    torch.testing.assert_close(got, -(smoothed * module(mixed).log_softmax(1)).sum(1).mean())


def test_epoch_sums_are_those_of_all_images_and_start_again():
    module = ImageClassifier(label_smoothing=0.0, model_kwargs=NARROW).eval()
    batches = [(torch.randn(n, 3, 16, 16), torch.randint(0, 10, (n,))) for n in (8, 3)]
    for _ in range(2):
        module.on_train_epoch_start()
        for batch in batches:
            module.training_step(batch, 0)
    logits = torch.cat([module(images) for images, _ in batches])
    targets = torch.cat([targets for _, targets in batches])
    metrics = module.train_metrics()
    assert metrics["train/loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert metrics["train/acc"] == (logits.argmax(1) == targets).float().mean().item()
    assert module.totals.num_trained == 11


def test_test_metrics_equal_functions_of_all_logits(tmp_path):
    module, data = ImageClassifier(image_size=16, model_kwargs=NARROW), small_data(eval_batch_size=300)
    run = quiet_trainer(tmp_path)
    logged = run.test(module, data, verbose=False)[0]
    module.eval()
    with torch.no_grad():
        parts = [(module(images), targets) for images, targets in data.test_dataloader()]
    logits, targets = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    assert len(targets) == 1000
    assert logged["test/loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert logged["test/acc"] == pytest.approx((logits.argmax(1) == targets).float().mean().item())
    assert logged["test/f1"] == pytest.approx(multiclass_f1_score(logits, targets, 10).item())
    assert logged["test/ece"] == pytest.approx(multiclass_calibration_error(logits, targets, 10).item(), abs=1e-6)
    expected = torch.zeros(10, 10, dtype=torch.int64)
    for target, pred in zip(targets, logits.argmax(1), strict=True):
        expected[target, pred] += 1
    assert torch.equal(module.test_confusion, expected)


def test_a_validation_before_training_or_one_that_was_cut_leaves_nothing_in_the_metrics(tmp_path):
    class Stop(pl.Callback):
        def on_validation_batch_end(self, *_):
            raise ZeroDivisionError

    module, data = ImageClassifier(image_size=16, model_kwargs={"widths": (2, 4)}), small_data()
    (first,) = quiet_trainer(tmp_path).validate(module, data, verbose=False)
    with pytest.raises(ZeroDivisionError):
        quiet_trainer(tmp_path, callbacks=[Stop()]).validate(module, data, verbose=False)
    (again,) = quiet_trainer(tmp_path).validate(module, data, verbose=False)
    assert again == first
    quiet_trainer(tmp_path, max_epochs=1).fit(module.train(), data)  # outside of inference mode


def test_fit_steps_one_cycle_to_its_end_and_logs_every_figure(tmp_path):
    module, data = ImageClassifier(image_size=16, lr=0.01, model_kwargs=NARROW), small_data()
    run = quiet_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0)
    run.fit(module, data)
    assert run.global_step == 18 == module.total_steps()
    assert run.optimizers[0].param_groups[0]["lr"] < 0.01 / 50
    names = {"train/loss", "train/acc", "lr", "val/loss", "val/acc", "val/f1", "val/ece"}
    assert names <= set(run.callback_metrics)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_epochs": 3}, 27),
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, 15),
        ({"max_epochs": 3, "limit_train_batches": 4}, 12),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 12),
        ({"max_epochs": 3, "max_steps": 10}, 10),
    ],
)
def test_total_steps_are_those_that_lightning_estimates(tmp_path, settings, expected):
    module, data = ImageClassifier(image_size=16, model_kwargs=NARROW), small_data()
    run = quiet_trainer(tmp_path, **settings)
    seen = {}

    class Compare(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen["total"], seen["estimated"] = pl_module.total_steps(), trainer.estimated_stepping_batches
            trainer.should_stop = True

    run.callbacks.append(Compare())
    run.fit(module, data)
    assert seen == {"total": expected, "estimated": expected}


def test_a_validation_may_be_due_after_a_time(tmp_path):
    run = quiet_trainer(tmp_path, max_epochs=1, val_check_interval="00:01:00:00", num_sanity_val_steps=0)
    run.fit(ImageClassifier(image_size=16, model_kwargs=NARROW), small_data())
    assert run.global_step == 9


@pytest.mark.parametrize("settings", [{"model_kwargs": NARROW}, {**SPEED, "stem_train_fraction": 0.5}])
def test_a_later_fit_of_a_trainer_anneals_over_the_epochs_that_are_left(tmp_path, settings):
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
            seen.append((rates, [parameter.requires_grad for parameter in pl_module.parameters()]))

    module = ImageClassifier(image_size=16, **settings)
    run = quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=0, callbacks=[Watch()])
    run.fit(module, small_data())
    peak = module.peak_step()
    run.fit_loop.max_epochs = 2
    run.fit(module, small_data())
    assert seen[9:] == seen[:9]
    assert module.total_steps() == run.global_step == 18
    assert module.peak_step() == 9 + peak
    run.fit(module, small_data())  # which has nothing left to train


def test_a_checkpoint_of_a_later_fit_resumes_with_the_schedule_of_that_fit(tmp_path):
    class Watch(pl.Callback):
        def __init__(self):
            self.rates = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_validation_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    settings = {"num_sanity_val_steps": 0, "limit_val_batches": 1}
    first, second = Watch(), Watch()
    module = ImageClassifier(image_size=16, model_kwargs=NARROW)
    run = quiet_trainer(tmp_path, max_epochs=1, callbacks=[first], **settings)
    run.fit(module, small_data())
    run.fit_loop.max_epochs = 3
    run.fit(module, small_data())
    resumed = quiet_trainer(tmp_path, max_epochs=3, callbacks=[second], **settings)
    other = ImageClassifier(image_size=16, model_kwargs=NARROW)
    resumed.fit(other, small_data(), ckpt_path=tmp_path / "18.ckpt")
    assert second.rates == first.rates[18:]
    assert len(second.rates) == 9


def test_speednet_is_whitened_once_and_its_stem_trained_for_its_fraction_only(tmp_path):
    module = ImageClassifier(image_size=16, stem_train_fraction=0.5, **SPEED)
    biases, whitened = [], []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            biases.append(pl_module.model.stem.bias.detach().clone())
            whitened.append(pl_module.model.stem.weight.detach().clone())

    run = quiet_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0)
    run.callbacks.append(Watch())
    data = small_data()
    run.fit(module, data)
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(biases)]
    assert moved == [True] * 8 + [False] * 9
    expected = WhiteningConv(3)
    expected.whiten(data.sample_of_training(5000))
    assert all(torch.equal(weight, expected.weight) for weight in whitened)
    assert run.optimizers[0].param_groups[0]["lr"] == 0
    biases.clear()
    again = quiet_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0, callbacks=[Watch()])
    again.fit(module, data)
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(biases)]
    assert moved == [True] * 8 + [False] * 9, "a second training is of the stem, too"


def test_filters_are_made_from_as_many_pixels_of_large_images_as_of_small_ones():
    module, asked = ImageClassifier(image_size=64, **SPEED), []

    def sample(num_images):
        asked.append(num_images)
        return torch.randn(8, 3, 64, 64)

    whiten(module.model.stem, fake_data(image_size=64, sample_of_training=sample))
    assert asked == [1250], "a quarter of the 5,000 of 32 pixels"
    assert module.model.stem.is_whitened


def test_speednet_without_our_data_asks_to_be_whitened(tmp_path):
    loader = DataLoader(TensorDataset(torch.randn(32, 3, 16, 16), torch.randint(0, 4, (32,))), batch_size=8)
    module = ImageClassifier(num_classes=4, image_size=16, **SPEED)
    with pytest.raises(UserError, match=r"stem\.whiten"), pytest.warns(PossibleUserWarning):
        quiet_trainer(tmp_path, max_epochs=1).fit(module, loader)


def test_views_are_averaged_in_test_and_not_while_training(tmp_path):
    module, data = ImageClassifier(image_size=16, model_kwargs=NARROW, tta="six", lr=0.01), small_data()
    run = quiet_trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0)
    run.fit(module, data)
    assert "val/acc_no_tta" not in run.callback_metrics
    logged = run.test(module, data, verbose=False)[0]
    module.eval()
    with torch.no_grad():
        parts = [(*tta_logits(module.model, images, "six"), targets) for images, targets in data.test_dataloader()]
    logits, plain, targets = (torch.cat([part[k] for part in parts]) for k in range(3))
    assert logged["test/acc"] == pytest.approx((logits.argmax(1) == targets).float().mean().item())
    assert logged["test/acc_no_tta"] == pytest.approx((plain.argmax(1) == targets).float().mean().item())
    assert logged["test/loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)


def test_a_run_without_an_end_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--epochs"):
        quiet_trainer(tmp_path, max_epochs=-1).fit(ImageClassifier(image_size=16, model_kwargs=NARROW), small_data())


def test_a_model_and_loaders_of_ones_own_train_too(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    loader = DataLoader(TensorDataset(torch.randn(32, 3, 8, 8), torch.randint(0, 4, (32,))), batch_size=8)
    before = model[1].weight.detach().clone()
    run = quiet_trainer(tmp_path, max_epochs=1)
    with pytest.warns(PossibleUserWarning):  # no validation, no worker processes: both meant
        run.fit(ImageClassifier(model=model, num_classes=4), loader)
    assert run.global_step == 4
    assert not torch.equal(model[1].weight, before)


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")  # of few workers
def test_loaders_of_ones_own_after_a_data_module_are_not_taken_for_it(tmp_path):
    module, writer = ImageClassifier(image_size=16, model_kwargs=NARROW), PredictionWriter(None)
    run = quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=0, callbacks=[writer])
    run.fit(module, small_data(class_weights="balanced"))
    assert module._class_weights is not None
    loader = DataLoader(TensorDataset(torch.randn(32, 3, 16, 16), torch.arange(32) % 10), batch_size=8)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader)
    assert module.total_steps() == run.global_step == 9 + 4
    assert module._class_weights is None
    run.test(module, loader, verbose=False)
    assert writer.test.class_names == tuple("0123456789"), "names of the data module are of other images"


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")  # of few workers
def test_images_without_labels_are_predicted(tmp_path):
    module, images = ImageClassifier(image_size=16, model_kwargs=NARROW), torch.randn(6, 3, 16, 16)
    predicted = [
        torch.cat(quiet_trainer(tmp_path).predict(module, DataLoader(given, batch_size=4)))
        for given in (images, TensorDataset(images), TensorDataset(images, torch.zeros(6)))
    ]
    assert predicted[0].shape == (6, 10)
    assert torch.equal(predicted[0], predicted[1])
    assert torch.equal(predicted[0], predicted[2])


def test_labels_of_any_integers_are_trained_on():
    module = ImageClassifier(image_size=16, model_kwargs=NARROW).eval()
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    expected = module.training_step((images, labels), 0)
    for dtype in (torch.int32, torch.uint8, torch.int16):
        assert module.training_step((images, labels.to(dtype)), 0) == expected


@pytest.mark.parametrize(
    ("batch", "given"),
    [
        ({"image": torch.zeros(2, 3, 16, 16), "label": torch.zeros(2).long()}, "a dict of 2"),
        ([[torch.zeros(2, 3, 16, 16), torch.zeros(2).long()]] * 2, "a list of 2"),  # of two loaders
        ([torch.zeros(2, 3, 16, 16)], "a list of 1"),
        ([torch.zeros(2, 3, 16, 16), torch.zeros(2).long(), torch.zeros(2)], "a list of 3"),
        (torch.zeros(2, 3, 16, 16), "a Tensor,"),
    ],
)
def test_a_batch_that_is_no_pair_of_images_and_labels_is_refused_with_its_form(batch, given):
    with pytest.raises(UserError, match=f"a batch is {given}.*images, labels"):
        unpack_batch(batch)


class Tempered(ImageClassifier):
    """Has a parameter and a layer of its own next to the model."""

    def __init__(self, **kwargs):
        super().__init__(image_size=16, model_kwargs=NARROW, lr=0.01, **kwargs)
        self.temperature, self.mixed = nn.Parameter(torch.ones(())), nn.Linear(10, 10)

    def forward(self, images):
        return self.mixed(super().forward(images)) / self.temperature


class OwnHooks(ImageClassifier):
    """Overrides hooks as a LightningModule's are, without super()."""

    def on_fit_start(self):
        pass

    def on_save_checkpoint(self, checkpoint):
        pass

    def on_load_checkpoint(self, checkpoint):
        pass

    def on_train_start(self):
        pass

    def on_train_epoch_start(self):
        pass

    def on_before_optimizer_step(self, optimizer):
        pass


def test_hooks_of_a_subclass_without_super_leave_out_nothing_of_the_training(tmp_path):
    torch.manual_seed(0)
    torch.save(ImageClassifier(image_size=16, model_kwargs=NARROW).model.state_dict(), tmp_path / "trained.pt")
    settings = {"image_size": 16, "model_kwargs": NARROW, "lr": 0.01, "pretrained": str(tmp_path / "trained.pt")}
    logged, resumed, saved = [], [], []
    for kind in (ImageClassifier, OwnHooks):
        torch.manual_seed(1)
        module, data = kind(**settings), small_data(class_weights="balanced", limit=197)
        run = quiet_trainer(tmp_path, max_epochs=2, limit_val_batches=0)
        run.fit(module, data)
        logged.append({name: value.item() for name, value in run.callback_metrics.items()})
        run.save_checkpoint(tmp_path / "two.ckpt")
        saved.append(torch.load(tmp_path / "two.ckpt", weights_only=True))
        again = kind(**settings)
        more = quiet_trainer(tmp_path, max_epochs=3, limit_val_batches=0)
        more.fit(again, small_data(class_weights="balanced", limit=197), ckpt_path=tmp_path / "two.ckpt")
        resumed.append(again.state_dict())
    assert logged[0] == logged[1]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(tensor, resumed[1][name]) for name, tensor in resumed[0].items())


class OwnStart(ImageClassifier):
    """Makes its own model, and has a setup and an on_fit_start without super()."""

    def __init__(self):
        super().__init__(image_size=16, model_kwargs=NARROW, freeze="features*")
        self.model = build_model("smallnet", 10, 16, **NARROW)

    def setup(self, stage):
        pass

    def on_fit_start(self):
        pass

    def on_train_start(self):
        self.num_images = self.totals.num_images


class RestoredSums(pl.Callback):
    """Stands for the resume inside an epoch of which 40 images were trained."""

    def on_train_start(self, trainer, pl_module):
        if isinstance(pl_module, ImageClassifier):
            pl_module.totals.restore((torch.tensor(4.0), torch.tensor(3.0), 40))


def test_a_setup_without_super_freezes_its_model_and_a_resumed_epoch_keeps_its_sums(tmp_path):
    module = OwnStart()
    before = module.model.features[0].weight.detach().clone()
    run = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=0, callbacks=[RestoredSums()])
    run.fit(module, small_data())
    assert torch.equal(module.model.features[0].weight, before)
    assert module.num_images == 40
    run.fit_loop.max_epochs = 2
    run.fit(BoringModel())  # with the callbacks of the module before, which the Trainer keeps


class OwnValidation(ImageClassifier):
    """Validates as other LightningModules do."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


def test_a_validation_step_that_leaves_the_metrics_out_is_refused_with_what_to_do(tmp_path):
    module = OwnValidation(image_size=16, model_kwargs=NARROW)
    with pytest.raises(UserError, match=r"validation_step.*super\(\)\.validation_step"):
        quiet_trainer(tmp_path, max_epochs=1).fit(module, small_data())


class SeveralLoaders(ImageClassifier):
    """Takes several validation loaders, and gives the metrics of ImageClassifier the first `num_counted`."""

    num_counted = 2

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if dataloader_idx < self.num_counted:
            super().validation_step(batch, batch_idx)
        else:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


@pytest.mark.parametrize("command", ["validate", "fit"])
def test_several_loaders_are_not_counted_together(tmp_path, command):
    module, data = SeveralLoaders(image_size=16, model_kwargs=NARROW), small_data()
    given = [data.val_dataloader(), data.test_dataloader()]
    arguments = (data.train_dataloader(), given) if command == "fit" else (given,)
    with pytest.raises(UserError, match=r"2 val loaders.*trainer\.validate for each"):
        getattr(quiet_trainer(tmp_path, max_epochs=1), command)(module, *arguments)
    (alone,) = quiet_trainer(tmp_path).validate(module, given[0], verbose=False)
    module.num_counted = 1
    first, second = quiet_trainer(tmp_path).validate(module, given, verbose=False)
    assert first["val/loss"] == alone["val/loss"]
    assert "val_loss/dataloader_idx_1" in second


class WithModel(nn.Module):
    """A loss that holds the model, to penalize its weights."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, logits, labels):
        return F.cross_entropy(logits, labels) + 1e-3 * self.model[1].weight.square().sum()


@pytest.mark.parametrize("settings", [{}, {"optimizer": "muon"}, {"optimizer": "sgd", "freeze": "backbone"}])
def test_parameters_of_a_subclass_next_to_its_model_are_trained(tmp_path, settings):
    module = Tempered(**settings)
    before = [parameter.detach().clone() for parameter in (module.temperature, module.mixed.weight)]
    run = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=3, limit_val_batches=0)
    run.fit(module, small_data())
    for old, new in zip(before, (module.temperature, module.mixed.weight), strict=True):
        assert not torch.equal(old, new)
    groups = run.optimizers[0].param_groups
    assert next(group["weight_decay"] for group in groups if module.temperature in set(group["params"])) == 0


def test_frozen_parameters_next_to_the_model_are_not_in_the_optimizer(tmp_path):
    module = ImageClassifier(image_size=16, model_kwargs=NARROW)
    module.teacher = nn.Linear(2, 2).requires_grad_(False)
    run = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    run.fit(module, small_data())
    trained = {parameter for group in run.optimizers[0].param_groups for parameter in group["params"]}
    assert trained == set(module.model.parameters())


def test_a_loss_may_hold_the_model(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    before = model[1].weight.detach().clone()
    run = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=3, limit_val_batches=0)
    run.fit(ImageClassifier(model=model, image_size=16, loss=WithModel(model)), small_data())
    assert not torch.equal(model[1].weight, before)


def test_steps_that_there_are_none_of_are_refused(tmp_path):
    with pytest.raises(UserError, match="no step to train"):
        quiet_trainer(tmp_path, max_epochs=0).fit(ImageClassifier(image_size=16, model_kwargs=NARROW), small_data())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "--model.lr -1.0"),
        ({"lr": float("nan")}, "--model.lr nan"),
        ({"sgd_lr": 0.0}, "--model.sgd_lr 0.0"),
        ({"weight_decay": -0.1}, "--model.weight_decay -0.1"),
        ({"label_smoothing": 1.0}, "--model.label_smoothing 1.0"),
        ({"pct_start": -0.1}, "--model.pct_start -0.1"),
        ({"mixup": -0.2}, "--model.mixup -0.2"),
        ({"cutmix": float("inf")}, "--model.cutmix inf"),
        ({"ema_decay": 1.0}, "--model.ema_decay 1.0"),
        ({"name": "resnet19"}, "--model.name resnet19"),
        ({"model_kwargs": {"num_classes": 3}}, "num_classes cannot be set"),
        ({"model_kwargs": {"image_size": 3}}, "image_size cannot be set"),
        ({"model_kwargs": {"name": "resnet18"}}, "name cannot be set"),
    ],
)
def test_a_value_that_cannot_train_names_its_flag(arguments, message):
    with pytest.raises(UserError, match=message):
        ImageClassifier(**arguments)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.parametrize("mixup", [0.0, 0.2])
def test_class_weights_are_of_the_precision_of_the_logits(precision, mixup, tmp_path):
    module = ImageClassifier(image_size=16, model_kwargs=NARROW, mixup=mixup)
    trainer = quiet_trainer(tmp_path, precision=precision, max_steps=1, limit_val_batches=0, max_epochs=1)
    trainer.fit(module, small_data(class_weights="balanced"))
    assert trainer.global_step == 1


def test_a_model_is_tested_with_the_normalization_that_it_was_trained_with(tmp_path):
    data, module = small_data(), ImageClassifier(image_size=16, model_kwargs=NARROW, lr=0.01)
    quiet_trainer(tmp_path, max_epochs=1).fit(module, data)
    before = quiet_trainer(tmp_path).test(module, data, verbose=False)
    data.use_normalization((0.9,) * 3, (0.1,) * 3)  # as the pretrained weights of another model do
    assert quiet_trainer(tmp_path).test(module, data, verbose=False) == before
    trainer = quiet_trainer(tmp_path)
    trainer.validate(module, data, verbose=False)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    data.use_normalization((0.9,) * 3, (0.1,) * 3)
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert quiet_trainer(tmp_path).test(loaded, data, verbose=False) == before
    evaluated = ImageClassifier(image_size=16, model_kwargs=NARROW)
    trainer.test(evaluated, small_data(), ckpt_path=tmp_path / "one.ckpt", weights_only=True, verbose=False)
    data.use_normalization((0.9,) * 3, (0.1,) * 3)
    assert quiet_trainer(tmp_path).test(evaluated, data, verbose=False) == before
