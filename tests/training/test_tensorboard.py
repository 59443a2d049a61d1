"""What TensorBoard is given: read back from the event files, against references."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fitting import NARROW, quiet_trainer, small_data
from lightning.pytorch.trainer.states import TrainerFn, TrainerState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from cifar_lightning import ImageClassifier, ImageDataModule
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training import tensorboard
from cifar_lightning.training.tensorboard import (
    MAX_DRAWINGS,
    Dashboard,
    RunBoard,
    board_for,
    hyperparameters_of,
    tags_of,
)

CONFIG = {"seed_everything": 3, "model": {"name": "smallnet", "lr": 0.01, "sgd_lr": None}, "data": {"flip": "random"}}
CONFIG |= {"trainer": {"max_epochs": 2, "max_steps": -1}}


class Keeper(pl.Callback):
    """Keeps the validation's predictions of each epoch."""

    def __init__(self):
        self.epochs, self._parts = [], []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *args):
        self._parts.append((outputs.cpu(), batch[1].cpu()))

    def on_validation_end(self, trainer, pl_module):
        self.epochs.append([torch.cat(part).numpy() for part in zip(*self._parts, strict=True)])
        self._parts = []


def fit(tmp_path, epochs=2, test=True, with_board=True):
    """Train a narrow network; return the folder, the data and the validation's predictions."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    keeper = Keeper()
    data = ImageDataModule("synthetic", batch_size=900, image_size=16)
    data.setup()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=RunBoard(run),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=[Dashboard(data.class_names, CONFIG), keeper] if with_board else [keeper],
    )
    module = ImageClassifier(image_size=16, model_kwargs={"widths": [2, 2, 2]})
    trainer.fit(module, data)
    if test:
        loggers, trainer.loggers = trainer.loggers, []
        trainer.validate(module, data, verbose=False)
        trainer.loggers = loggers
        trainer.test(module, data, verbose=False)
    trainer.loggers[0].experiment.close()
    return run, data, keeper.epochs, trainer


def events_of(run):
    events = EventAccumulator(str(run.path), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    return events


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run, data, predictions, trainer = fit(tmp_path_factory.mktemp("board"))
    return events_of(run), data, predictions, trainer


def test_each_class_has_its_recall_at_each_validation(trained):
    events, data, predictions, _ = trained
    for index, name in enumerate(data.class_names):
        shown = [event.value for event in events.Scalars(f"val_acc_of_class/{name}")]
        expected = [(logits.argmax(1)[targets == index] == index).mean() for logits, targets in predictions[:2]]
        assert shown == pytest.approx(expected)


def test_figures_and_mistakes_come_with_each_validation_of_a_short_run(trained):
    events, *_ = trained
    for tag in ("visuals/confusion_matrix", "visuals/most_confident_mistakes", "visuals/reliability"):
        assert len(events.Images(tag)) == 2
    assert len(events.Images("visuals/batch_as_trained_on")) == 1


def test_the_pr_curves_count_as_numpy_does(trained):
    events, data, predictions, _ = trained
    logits, targets = predictions[1]
    probs = torch.from_numpy(logits).double().softmax(1).numpy()
    for index, name in enumerate(data.class_names):
        event = events.Tensors(f"pr_of_class/{name}")[-1]
        tp, fp, tn, fn, _, recall = make_ndarray(event.tensor_proto)
        assert tp[0] + fn[0] == (targets == index).sum()
        assert tp[0] + fp[0] + tn[0] + fn[0] == len(targets)
        middle = len(tp) // 2  # the threshold of a half
        assert tp[middle] == pytest.approx(((probs[:, index] >= 0.5) & (targets == index)).sum(), abs=1)
        assert recall[0] == 1
        assert (np.diff(recall) <= 1e-6).all()


def test_the_mistakes_shown_are_the_most_confident_ones(tmp_path, monkeypatch):
    shown = []

    def keep(images, titles):
        shown.append((images, list(titles)))
        from cifar_lightning.report.figures import images_figure

        return images_figure(images, titles)

    monkeypatch.setattr("cifar_lightning.training.tensorboard.images_figure", keep)
    _, data, predictions, _ = fit(tmp_path, epochs=1, test=False)
    logits, targets = predictions[0]
    probs = torch.from_numpy(logits).double().softmax(1).numpy()
    wrong = np.flatnonzero(probs.argmax(1) != targets)
    worst = wrong[np.argsort(-probs[wrong].max(1), kind="stable")][:16]
    images, titles = shown[-1]
    assert (images == data.images("val", worst)).all()
    names = data.class_names
    first = f"{names[targets[worst[0]]]}\nas {names[probs[worst[0]].argmax()]} {100 * probs[worst[0]].max():.0f} %"
    assert titles[0] == first


def drawn_at(monkeypatch, steps, total, resumed_at=0):
    """Return the steps of the validations that are drawn of those at `steps`."""
    trainer = SimpleNamespace(state=TrainerState(fn=TrainerFn.FITTING), estimated_stepping_batches=total)
    vars(trainer).update(is_global_zero=True, loggers=(), global_step=resumed_at)
    monkeypatch.setattr("cifar_lightning.training.tensorboard.image_loggers", lambda trainer: [object()])
    dashboard, drawn = Dashboard(("a", "b"), {}), []
    dashboard.on_train_start(trainer, None)
    for trainer.global_step in steps:
        dashboard.on_validation_start(trainer, None)
        if dashboard._is_drawing:
            drawn.append(trainer.global_step)
    return drawn


@pytest.mark.parametrize(("num_validations", "drawings"), [(5, 5), (20, 20), (33, 20), (100, 20), (1000, 20)])
def test_a_run_is_drawn_at_most_20_times_evenly_and_at_its_end(num_validations, drawings, monkeypatch):
    drawn = drawn_at(monkeypatch, range(7, 7 * num_validations + 1, 7), 7 * num_validations)
    assert len(drawn) == drawings <= MAX_DRAWINGS
    assert drawn[-1] == 7 * num_validations
    gaps = np.diff([0, *drawn]) // 7
    assert gaps.max() - gaps.min() <= 1


def test_a_resumed_run_draws_no_more_than_what_is_left(monkeypatch):
    assert drawn_at(monkeypatch, range(905, 1001, 5), 1000, resumed_at=900) == [950, 1000]


def test_pr_curves_are_of_the_first_20_classes(monkeypatch):
    curves, names = [], [f"class {number}" for number in range(25)]
    logits, targets = torch.randn(60, 25), torch.arange(60) % 25
    monkeypatch.setattr("cifar_lightning.training.tensorboard.log_image", lambda *_: None)
    monkeypatch.setattr("cifar_lightning.training.tensorboard.training_data", lambda trainer: None)
    dashboard = Dashboard(names, {})
    dashboard._predictions = [(logits, targets)]
    board = SimpleNamespace(add_pr_curve=lambda tag, is_class, prob, step: curves.append((tag, is_class, prob)))
    dashboard._draw_predictions(SimpleNamespace(global_step=1), board)
    assert [tag for tag, *_ in curves] == [f"pr_of_class/{tag}" for tag in tags_of(names)[:20]]
    for index, (_, is_class, prob) in enumerate(curves):
        assert (is_class == (targets == index).numpy()).all()
        assert prob == pytest.approx(logits.softmax(1)[:, index].numpy(), abs=1e-6)


def test_the_run_has_its_line_in_the_hparams_tab_with_real_metrics(trained):
    from tensorboard.plugins.hparams import plugin_data_pb2

    events, _, predictions, trainer = trained
    logits, targets = predictions[-1]
    assert events.Scalars("val_best/acc")[0].value == pytest.approx((logits.argmax(1) == targets).mean())
    assert events.Scalars("val_best/test_acc")[0].value == pytest.approx(float(trainer.callback_metrics["test/acc"]))
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert values["model"].string_value == "smallnet"
    assert values["lr"].number_value == 0.01
    assert values["seed"].number_value == 3
    assert "sgd_lr" not in values
    experiment = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    metrics = plugin_data_pb2.HParamsPluginData.FromString(experiment).experiment.metric_infos
    assert {metric.name.tag for metric in metrics} == {"val_best/acc", "val_best/test_acc", "val_best/test_loss"}


def test_the_groups_that_tensorboard_opens_at_first_are_train_and_val(trained):
    tags = trained[0].Tags()
    groups = {tag.partition("/")[0] for tag in (*tags["scalars"], *tags["images"])}
    assert sorted(groups) == ["train", "val", "val_acc_of_class", "val_best", "visuals"]


def test_a_run_has_one_file_of_events_with_the_steps_of_its_tables(trained):
    events, _, _, trainer = trained
    assert len(list(Path(events.path).glob("events.out.tfevents.*"))) == 1
    per_epoch = trainer.num_training_batches
    for tag in ("train/loss", "train/acc", "val/loss", "val/acc"):
        assert [event.step for event in events.Scalars(tag)] == [per_epoch, 2 * per_epoch]


def test_the_charts_are_of_tags_that_exist_and_begin_with_the_accuracy_of_validation(trained):
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    events, *_ = trained
    (tensor,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(tensor.tensor_proto.string_val[0])
    charts = [list(chart.multiline.tag) for chart in layout.category[0].chart]
    assert charts[0] == ["val/acc", "train/acc"]
    tags = events.Tags()["scalars"]
    assert all(any(re.match(pattern, tag) for tag in tags) for chart in charts for pattern in chart)


def test_a_resumed_run_takes_over_the_events_up_to_its_step(tmp_path):
    first = RunBoard(RunFolder(tmp_path))
    for step in range(1, 6):
        first.log_metrics({"val/acc": step / 10, "epoch": 1, "lr": 1}, step)
    first.experiment.add_custom_scalars({})
    first.finalize("success")
    first.experiment.close()
    damaged = tmp_path / "events.out.tfevents.1.damaged"
    damaged.write_bytes(b"no events")
    second = board_for(RunFolder(tmp_path), 3)
    second.log_metrics({"val/acc": 0.9}, 4)
    second.finalize("success")
    assert len(list(tmp_path.iterdir())) == 1
    shown = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, round(event.value, 6)) for event in shown.Scalars("val/acc")] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 0.9),
    ]
    assert shown.Tags()["scalars"] == ["val/acc"]
    assert shown.Tags()["tensors"] == []


def test_tags_hold_what_tensorboard_takes_and_each_class_has_its_own():
    assert tags_of(["cat", "red fox", "a/b", "caf\udce9", "狗"]) == ["cat", "red_fox", "a_b", "caf_", "狗"]
    assert tags_of(["a b", "a_b", "c"]) == ["0_a_b", "1_a_b", "c"]
    assert len(set(tags_of(["a b", "a/b", "0_a_b", "2_0_a_b", "c"]))) == 5


def test_hyperparameters_are_plain_and_leave_out_what_is_not_set():
    assert hyperparameters_of(CONFIG) == {
        "seed": 3,
        "model": "smallnet",
        "lr": 0.01,
        "random_augmentation": "flip random",
        "epochs": 2,
    }
    assert hyperparameters_of({}) == {}


def test_predictions_that_are_not_finite_are_not_drawn_and_training_continues(tmp_path, monkeypatch):
    forward = ImageClassifier.forward

    def spoiled(self, images):  # in validation alone: in training the run would stop
        return forward(self, images) * (1 if self.training else math.nan)

    monkeypatch.setattr(ImageClassifier, "forward", spoiled)
    run, data, *_ = fit(tmp_path, epochs=1, test=False)
    events = events_of(run)
    assert "visuals/most_confident_mistakes" not in events.Tags()["images"]
    assert len(events.Scalars(f"val_acc_of_class/{data.class_names[0]}")) == 1


def test_names_that_are_too_few_do_not_end_training(tmp_path, capsys):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    settings = {"logger": RunBoard(run), "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    module = ImageClassifier(image_size=16, model_kwargs=NARROW)
    quiet_trainer(tmp_path, max_epochs=2, callbacks=[Dashboard(["a", "b"])], **settings).fit(module, small_data())
    assert capsys.readouterr().out.count("2 class names for 10 logits") == 1


def test_the_sanity_check_before_training_is_not_drawn(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    data = small_data()
    settings = {"logger": RunBoard(run), "log_every_n_steps": 1, "num_sanity_val_steps": 2}
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[Dashboard(data.class_names)], **settings)
    trainer.fit(ImageClassifier(image_size=16, model_kwargs=NARROW), data)
    trainer.loggers[0].experiment.close()
    assert [event.step for event in events_of(run).Scalars(f"val_acc_of_class/{data.class_names[0]}")] == [9]


def test_of_many_classes_a_histogram_shows_the_accuracies(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "_MAX_CLASS_SCALARS", 9)
    run, _, predictions, _ = fit(tmp_path, epochs=1, test=False)
    events = events_of(run)
    assert not any(tag.startswith("val_acc_of_class/") for tag in events.Tags()["scalars"])
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"val/acc" in layout
    assert b"val_acc_of_class" not in layout
    (event,) = events.Histograms("val_acc_of_classes")
    numbers = np.array(event.histogram_value.bucket)
    ((logits, targets),) = predictions
    accuracies = [(logits.argmax(1)[targets == index] == index).mean() for index in range(10)]
    expected = np.histogram(accuracies, np.linspace(0, 1, 31))[0]
    assert numbers[numbers > 0].tolist() == expected[expected > 0].tolist()


def test_the_dashboard_changes_nothing_of_the_training(tmp_path):
    weights = []
    for name, with_board in (("with", True), ("without", False)):
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        trainer = fit(tmp_path / name, test=False, with_board=with_board)[-1]
        weights.append(trainer.lightning_module.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_folder_that_tensorboard_cannot_name_has_no_dashboard_and_says_so(tmp_path, capsys):
    assert board_for(RunFolder(tmp_path / "r\udcfc"), None) is False
    assert "not UTF-8" in capsys.readouterr().out
    assert isinstance(board_for(RunFolder(tmp_path / "r\u00fc"), None), RunBoard)
