"""What ImageClassifier saves and begins with: its checkpoints, runs that go on from one, trained weights."""

from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fitting import SPEED, fit_run, quiet_trainer, small_data

from benchmarks.faults.judge import differences
from cifar_lightning import ImageClassifier, ImageDataModule, UserError
from cifar_lightning.checkpoints.loading import read_checkpoint
from cifar_lightning.checkpoints.schema import DATA_STATE
from cifar_lightning.inference.trained_model import load_trained_model
from cifar_lightning.models.registry import build_model
from cifar_lightning.transforms.augmentation import normalize

NARROW = {"widths": [4, 8, 8], "dropout": 0.0}
ADAMW = {"optimizer": "adamw", "lr": 0.01, "model_kwargs": NARROW}
MUON = {**ADAMW, "optimizer": "muon"}


def test_a_checkpoint_holds_plain_types_and_makes_the_module_again(tmp_path):
    module = ImageClassifier(image_size=16, model_kwargs=NARROW, optimizer="muon", lr=0.05)
    run = quiet_trainer(tmp_path, max_epochs=1)
    run.fit(module, small_data())
    run.save_checkpoint(tmp_path / "one.ckpt")
    content = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert content["hyper_parameters"]["model_kwargs"] == NARROW
    assert content["ImageDataModule"]["class_names"][0] == "disk"
    again = ImageClassifier.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.eval()(images), module.eval()(images))


def test_a_module_that_a_checkpoint_was_loaded_into_plans_a_new_run_over_its_own_steps(tmp_path):
    module = ImageClassifier(image_size=16, model_kwargs=NARROW, lr=0.01)
    run = quiet_trainer(tmp_path, max_epochs=3)
    run.fit(module, small_data())
    run.save_checkpoint(tmp_path / "three.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "three.ckpt", weights_only=True)
    quiet_trainer(tmp_path).test(
        module, small_data(), ckpt_path=tmp_path / "three.ckpt", weights_only=True, verbose=False
    )
    for again in (loaded, module):
        run = quiet_trainer(tmp_path, max_epochs=1)
        run.fit(again, small_data())
        assert again.total_steps() == run.global_step == 9
        assert run.optimizers[0].param_groups[0]["lr"] < 1e-3, "annealed"


def test_a_loaded_checkpoint_is_not_overwritten_by_the_weights_that_its_run_began_with(tmp_path):
    torch.save(build_model("smallnet", 10, 16, **NARROW).state_dict(), tmp_path / "begin.pt")
    module = ImageClassifier(image_size=16, model_kwargs=NARROW, lr=0.01, pretrained=str(tmp_path / "begin.pt"))
    run = quiet_trainer(tmp_path, max_epochs=1)
    run.fit(module, small_data())
    run.save_checkpoint(tmp_path / "one.ckpt")
    again = ImageClassifier.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    again.setup("fit")
    again.prepare(None)
    assert torch.equal(again.model.features[0].weight, module.model.features[0].weight)


def test_a_checkpoint_of_another_model_is_refused_in_a_line(tmp_path):
    run = quiet_trainer(tmp_path, max_epochs=1)
    run.fit(ImageClassifier(image_size=16, model_kwargs=NARROW), small_data())
    run.save_checkpoint(tmp_path / "one.ckpt")
    other = ImageClassifier(image_size=16, model_kwargs={"widths": [4, 8, 6]})
    with pytest.raises(UserError, match="another model: "):
        quiet_trainer(tmp_path).test(other, small_data(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)


class WithLayer(ImageClassifier):
    """Has a layer that no earlier checkpoint has."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.layer = torch.nn.Linear(2, 2)


def test_a_checkpoint_that_lacks_a_layer_is_loaded_where_strict_is_false(tmp_path):
    path, module = tmp_path / "one.ckpt", ImageClassifier(image_size=16, model_kwargs=NARROW)
    run = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1)
    run.fit(module, small_data())
    run.save_checkpoint(path)
    with pytest.raises(UserError, match=r"another model: .*layer\.weight"):
        WithLayer.load_from_checkpoint(path, weights_only=True)
    with pytest.warns(UserWarning, match="not in the checkpoint"):
        again = WithLayer.load_from_checkpoint(path, weights_only=True, strict=False)
    assert torch.equal(again.model.head.weight, module.model.head.weight)
    module.layer, module.strict_loading = torch.nn.Linear(2, 2), False
    quiet_trainer(tmp_path).test(module, small_data(), ckpt_path=path, weights_only=True, verbose=False)


@pytest.mark.parametrize("stop_at", [9, 18, 13], ids=["after epoch 1", "after epoch 2", "inside epoch 2"])
@pytest.mark.parametrize(
    "settings", [ADAMW, MUON, {**SPEED, "stem_train_fraction": 0.4}], ids=["adamw", "muon", "speednet"]
)
def test_a_resumed_run_without_dropout_ends_with_the_weights_of_an_unbroken_one(tmp_path, stop_at, settings):
    class SaveAt(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == stop_at and stop_at % 9:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.global_step == stop_at:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    def fresh(*callbacks):
        torch.manual_seed(0)
        module = ImageClassifier(image_size=16, **settings)
        return module, quiet_trainer(tmp_path, max_epochs=3, num_sanity_val_steps=0, callbacks=list(callbacks))

    unbroken, run = fresh(SaveAt())
    run.fit(unbroken, small_data(train_sizes=[12, 16]))
    resumed, run = fresh()
    run.fit(resumed, small_data(train_sizes=[12, 16]), ckpt_path=tmp_path / "stopped.ckpt", weights_only=True)
    assert run.global_step == 27
    for left, right in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)


def test_odd_values_leave_a_checkpoint_that_loads_as_data(tmp_path):
    odd = {"widths": [2], "dropout": np.float64(0.5)}
    module = ImageClassifier(image_size=16, lr=np.float64(0.01), weight_decay=np.float64(0), model_kwargs=odd)
    module.save_hyperparameters({"path": Path("x"), "part": partial(print, 1)})
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        limit_val_batches=0,
    )
    trainer.fit(module, ImageDataModule("synthetic", batch_size=900, image_size=16))
    trainer.save_checkpoint(tmp_path / "odd.ckpt")
    read = torch.load(tmp_path / "odd.ckpt", weights_only=True)["hyper_parameters"]
    assert (read["lr"], read["path"]) == (0.01, "x")
    assert read["model_kwargs"] == {"widths": [2], "dropout": 0.5}


def test_trained_weights_begin_a_run_with_their_normalisation_and_a_new_head(tmp_path):
    torch.manual_seed(1)
    trained = ImageClassifier(image_size=16, num_classes=7, model_kwargs=NARROW)
    torch.save(trained.model.state_dict(), tmp_path / "trained.pt")
    module = ImageClassifier(image_size=16, model_kwargs=NARROW, pretrained=str(tmp_path / "trained.pt"))
    head = module.model.head.weight.detach().clone()
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append({name: value.clone() for name, value in pl_module.model.state_dict().items()})

    data = small_data()
    quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1, callbacks=[Look()]).fit(module, data)
    for name, value in trained.model.state_dict().items():
        if not name.startswith("head"):
            assert torch.equal(seen[0][name], value)
    assert torch.equal(seen[0]["head.weight"], head)
    assert data.mean != (0.485, 0.456, 0.406)  # a file of a network of ours says nothing of its images


def test_a_resumed_run_does_not_load_its_pretrained_weights_again(tmp_path):
    path = tmp_path / "trained.pt"
    torch.save(ImageClassifier(image_size=16, model_kwargs=NARROW).model.state_dict(), path)
    settings = {"image_size": 16, "model_kwargs": NARROW, "pretrained": str(path)}
    first = quiet_trainer(tmp_path, max_epochs=1)
    first.fit(ImageClassifier(**settings), small_data())
    first.save_checkpoint(tmp_path / "first.ckpt")
    path.unlink()
    second, module = quiet_trainer(tmp_path, max_epochs=2), ImageClassifier(**settings)
    second.fit(module, small_data(), ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert second.global_step == 18


def test_more_epochs_move_the_line_of_a_resumed_run(tmp_path):
    settings = {"image_size": 16, "model_kwargs": NARROW, "lr": 0.1, "schedule": "linear"}
    first = quiet_trainer(tmp_path, max_epochs=2)
    first.fit(ImageClassifier(**settings), small_data())
    first.save_checkpoint(tmp_path / "first.ckpt")
    rates = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    second = quiet_trainer(tmp_path, max_epochs=4, callbacks=[Look()])
    second.fit(ImageClassifier(**settings), small_data(), ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert rates == pytest.approx([0.1 * (1 - step / 36) for step in range(18, 36)])


def test_weights_of_torchvision_have_the_images_normalised_as_there(tmp_path):
    trained = build_model("mobilenet_v3_small", num_classes=3, image_size=32)
    torch.save(trained.state_dict(), tmp_path / "trained.pt")
    module = ImageClassifier("mobilenet_v3_small", image_size=32, pretrained=str(tmp_path / "trained.pt"))
    data = ImageDataModule("synthetic", batch_size=64, limit=200)
    quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=1).fit(module, data)
    assert data.mean == (0.485, 0.456, 0.406)
    kept = data.state_dict()
    again = ImageDataModule("synthetic", batch_size=64, limit=200)
    again.load_state_dict(kept)
    again.setup()
    assert again.mean == data.mean  # what a later test of the run uses


@pytest.mark.parametrize("rank", [0, 1])
def test_how_images_of_ones_own_must_be_normalized_is_printed_once(monkeypatch, tmp_path, capsys, rank):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    torch.save(build_model("mobilenet_v3_small", num_classes=3, image_size=32).state_dict(), tmp_path / "trained.pt")
    module = ImageClassifier("mobilenet_v3_small", image_size=32, pretrained=str(tmp_path / "trained.pt"))
    module.prepare(None)
    assert capsys.readouterr().out.count("normalize the images with mean") == 1 - rank


class OwnOptimizer(ImageClassifier):
    """A classifier whose optimizer and schedule `configure` makes."""

    def __init__(self, configure):
        super().__init__(image_size=16, model_kwargs={**NARROW, "dropout": 0.3})
        self.configure = configure

    def configure_optimizers(self):
        return self.configure(self)


def plateau(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}


def two_groups(module):
    weights = {"params": [p for p in module.parameters() if p.ndim > 1], "lr": 0.02}
    rest = {"params": [p for p in module.parameters() if p.ndim <= 1], "lr": 0.001, "weight_decay": 0.1}
    optimizer = torch.optim.RAdam([weights, rest])
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=2)
    steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 4])
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, steps], milestones=[3])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": both, "interval": "step"}}


def step_lr(module):
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def adafactor(module):
    return pytest.importorskip("timm.optim").Adafactor(module.parameters())


@pytest.mark.parametrize(
    "configure",
    [lambda module: torch.optim.Adam(module.parameters(), lr=0.01), step_lr, plateau, two_groups, adafactor],
    ids=["Adam alone", "StepLR", "ReduceLROnPlateau", "groups and SequentialLR", "Adafactor without lr"],
)
def test_a_run_with_any_optimizer_and_schedule_of_ones_own_resumes_to_the_bit(tmp_path, configure):
    def fit(name, **more):
        torch.manual_seed(0)
        run, _ = fit_run(tmp_path / name, module=OwnOptimizer(configure), epochs=3, batch_size=60, **more)
        return torch.load(run.last_checkpoint, weights_only=True)

    whole = fit("whole")
    for steps in (3, 4) if configure is plateau else (4,):  # an epoch has 3
        fit(f"stopped_{steps}", trainer={"max_steps": steps})
        resumed = fit(f"resumed_{steps}", ckpt_path=tmp_path / f"stopped_{steps}" / "checkpoints" / "last.ckpt")
        for key in ("state_dict", "optimizer_states", "lr_schedulers"):
            assert differences(whole[key], resumed[key]) == [], (steps, key)


def test_the_state_of_a_data_module_of_any_class_is_found(tmp_path):
    class Mine(ImageDataModule):
        pass

    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(ImageClassifier(image_size=16, model_kwargs=NARROW), Mine("synthetic", image_size=16))
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    assert DATA_STATE not in torch.load(tmp_path / "mine.ckpt", weights_only=True)
    assert read_checkpoint(tmp_path / "mine.ckpt")[DATA_STATE]["image_size"] == 16
    fresh = ImageDataModule("synthetic", image_size=16)
    fresh.prepare_data()
    fresh.setup()
    fresh.use_normalization((0.0,) * 3, (1.0,) * 3)
    quiet_trainer(tmp_path, limit_test_batches=1).test(
        ImageClassifier(image_size=16, model_kwargs=NARROW), fresh, ckpt_path=tmp_path / "mine.ckpt", weights_only=True
    )
    assert fresh.mean == trainer.datamodule.mean


class Scaled(ImageClassifier):
    """Its logits are not those of its model alone."""

    def __init__(self, power=1.0, **kwargs):
        super().__init__(image_size=16, model_kwargs=NARROW, **kwargs)
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.power = power

    def forward(self, images):
        return self.scale**self.power * super().forward(images)


class OwnStep(ImageClassifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * 2


class Replaced(ImageClassifier):
    def __init__(self, width=2, num_classes=10):
        super().__init__(num_classes=num_classes, image_size=16)
        self.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, num_classes))


@pytest.mark.parametrize(
    ("module", "init_args"),
    [
        (Scaled(power=3.0), {"power": 3.0}),
        (Replaced(width=5), {"width": 5}),
        (OwnStep(image_size=16, model_kwargs=NARROW), None),  # made by its model's name
    ],
    ids=["forward", "another model", "training_step"],
)
def test_a_checkpoint_names_a_subclass_where_its_model_alone_has_other_logits(tmp_path, module, init_args):
    module.init_args = init_args  # here, jaxtyping's wrappers hide them from `save_hyperparameters`
    run, trainer = fit_run(tmp_path, module=module, epochs=1, trainer={"limit_train_batches": 1})
    if init_args is None:
        assert module.imported is None
        assert module.imported_class is None
    else:
        assert module.imported_class["path"] == f"{__name__}:{type(module).__qualname__}"
        assert module.imported_class["kwargs"]["init_args"].items() >= init_args.items()
    trained = load_trained_model(run, trust_code=True)
    images = trainer.datamodule.images("test", np.arange(4))
    with torch.inference_mode():
        normalized = normalize(torch.from_numpy(images), mean=torch.tensor(trained.mean), std=torch.tensor(trained.std))
        torch.testing.assert_close(trained.logits(torch.from_numpy(images)), module.eval()(normalized))
    if init_args is not None:
        with pytest.raises(UserError, match="--trust_code true"):
            load_trained_model(run)


class Gelu(ImageClassifier):
    """Another model with tensors of the same names and shapes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        for name, module in [*self.model.named_modules()]:
            if isinstance(module, torch.nn.ReLU):
                self.model.set_submodule(name, torch.nn.GELU())


def saved_by(module, tmp_path):
    run = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=1)
    run.fit(module, small_data())
    run.save_checkpoint(tmp_path / "one.ckpt")
    return torch.load(tmp_path / "one.ckpt", weights_only=True)


def test_a_subclass_that_changes_the_model_is_named_in_its_place(tmp_path):
    module = Gelu(image_size=16, model_kwargs=NARROW)
    assert saved_by(module, tmp_path)["imported_class"]["path"].endswith(":Gelu")
    images = torch.randn(2, 3, 16, 16)
    again = Gelu.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert torch.equal(again.eval()(images), module.eval()(images))
    with pytest.raises(UserError, match="Gelu"):
        ImageClassifier.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)


def test_a_class_that_cannot_be_imported_loads_its_checkpoint_and_no_other_does(tmp_path):
    class Local(Gelu):
        pass

    module = Local(image_size=16, model_kwargs=NARROW)
    images = torch.randn(2, 3, 16, 16)
    for _ in range(2):
        saved_by(module.train(), tmp_path)
        module = Local.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
        trainer = quiet_trainer(tmp_path)
        trainer.validate(module, small_data(), verbose=False)
        trainer.save_checkpoint(tmp_path / "one.ckpt")
        with pytest.raises(UserError, match="a subclass"):
            ImageClassifier.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
        again = Local.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
        assert torch.equal(again.eval()(images), module.eval()(images))


def test_a_model_that_was_changed_has_no_name_and_one_that_was_not_keeps_it(tmp_path):
    module = ImageClassifier(image_size=16, model_kwargs=NARROW)
    assert saved_by(module, tmp_path)["hyper_parameters"]["name"] == "smallnet"
    module.model.features = torch.nn.Sequential(*module.model.features, torch.nn.Identity())
    found = saved_by(module, tmp_path)["hyper_parameters"]
    assert (found["name"], found["model_kwargs"]) == (None, None)
    with pytest.raises(UserError, match="model="):
        ImageClassifier.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)


def test_an_own_model_that_was_changed_has_no_import_path(tmp_path):
    own = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Identity(), torch.nn.Linear(768, 10))
    module = ImageClassifier(model=own, image_size=16, memory_format="contiguous")
    module.imported = {"path": "test_module_checkpoint:flat", "kwargs": {}}
    assert saved_by(module, tmp_path)["imported"]["path"] == "test_module_checkpoint:flat"
    own[1] = torch.nn.Tanh()
    assert "imported" not in saved_by(module, tmp_path)


def flat(num_classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Identity(), torch.nn.Linear(768, num_classes))


class Rescaled(ImageClassifier):
    """Passes its other arguments on, as docs/extending.md shows."""

    def __init__(self, scale=1.0, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale

    def training_step(self, batch, batch_idx):
        return self.scale * super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "given", [{"loss": torch.nn.CrossEntropyLoss()}, {"name": f"{__name__}:flat", "memory_format": "contiguous"}]
)
def test_a_subclass_that_passes_arguments_on_is_loaded_with_a_loss_or_model_given_again(tmp_path, given):
    module = Rescaled(scale=2.0, image_size=16, **given)
    saved_by(module, tmp_path)
    again = Rescaled.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True, **given)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.eval()(images), module.eval()(images))


def test_a_subclass_around_a_given_model_is_loaded_with_that_model_given_again(tmp_path):
    class Stepping(ImageClassifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)

    own = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 10))
    saved_by(Stepping(model=own, image_size=16, memory_format="contiguous"), tmp_path)
    again = ImageClassifier.load_from_checkpoint(tmp_path / "one.ckpt", model=own, weights_only=True)
    assert again.model is own
