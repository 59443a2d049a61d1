"""Metrics of one's own and top-5 accuracy: logged, in the files of a run, and refused before training."""

import json

import pytest
import torch
from fitting import NARROW, fit_run, quiet_trainer, small_data
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassCohenKappa
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_cohen_kappa

from cifar_lightning import ImageClassifier, UserError
from cifar_lightning.metrics.classification import test_metrics, top_k_accuracy
from cifar_lightning.training.eval_metrics import evaluation_metrics, own_metrics, update_evaluation
from cifar_lightning.training.predictions import PredictionWriter

SETTINGS = {"image_size": 16, "model_kwargs": NARROW, "lr": 0.01}


def test_metrics_are_logged_written_and_computed_over_all_images(tmp_path):
    module = ImageClassifier(metrics={"kappa": MulticlassCohenKappa(10)}, **SETTINGS)
    run, trainer = fit_run(tmp_path / "run", module=module, epochs=1)
    header = run.metrics_csv.read_text().splitlines()[0].split(",")
    assert header[-1] == "val/kappa"
    trainer = quiet_trainer(tmp_path, callbacks=[PredictionWriter(run)])
    logged = trainer.test(module, small_data(), verbose=False)[0]
    arrays = json.loads(run.test_metrics.read_text())
    assert arrays["kappa"] == pytest.approx(logged["test/kappa"])
    module.eval()
    batches = [(module(images), labels) for images, labels in small_data_of(trainer)]
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert logged["test/kappa"] == pytest.approx(multiclass_cohen_kappa(logits, labels, 10).item(), abs=1e-6)


def small_data_of(trainer):
    return trainer.datamodule.test_dataloader()


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, []),
        ([], []),
        (MulticlassCohenKappa(10), ["MulticlassCohenKappa"]),
        ([MulticlassAUROC(10), MulticlassCohenKappa(10)], ["MulticlassAUROC", "MulticlassCohenKappa"]),
        (MetricCollection({"k": MulticlassCohenKappa(10)}), ["k"]),
    ],
)
def test_one_several_and_collections_have_names(given, names):
    assert [*(own_metrics(given) or {})] == names


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"acc": MulticlassCohenKappa(10)}, "acc: .*are taken"),
        ({"accuracy": MulticlassCohenKappa(10)}, "accuracy: .*are taken"),
        ([MulticlassAccuracy(10), MulticlassAccuracy(10)], "MulticlassAccuracy: given twice"),
        ({"a,b": MulticlassCohenKappa(10)}, "a,b: no name"),
        ([torch.nn.Linear(1, 1)], "a Linear, no torchmetrics"),
    ],
)
def test_names_that_clash_and_what_is_no_metric_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        own_metrics(given)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (MulticlassCohenKappa(7), "fails"),
        (MulticlassAccuracy(10, average=None), r"tensor \(10,\)"),
        (MeanMetric(), "fails"),
    ],
)
def test_a_metric_that_fails_on_a_few_images_is_refused_before_training(metric, words):
    module = ImageClassifier(metrics={"mine": metric}, **SETTINGS)
    with pytest.raises(UserError, match=f"--model.metrics mine: .*{words}"):
        module.prepare(None)


def test_top_5_is_reported_where_there_are_more_than_ten_classes():
    logits, labels = torch.randn(200, 12), torch.randint(0, 12, (200,))
    expected = multiclass_accuracy(logits, labels, 12, average="micro", top_k=5).item()
    assert top_k_accuracy(logits.numpy(), labels.numpy()) == pytest.approx(expected)
    names = [str(number) for number in range(12)]
    assert test_metrics(logits.numpy(), labels.numpy(), names)["accuracy_top5"] == pytest.approx(expected)
    assert "accuracy_top5" not in test_metrics(logits[:, :10].numpy(), labels.numpy() % 10, names[:10])
    metrics = evaluation_metrics(12)
    for part in (slice(0, 90), slice(90, 200)):
        update_evaluation(metrics, logits[part], logits[part], labels[part], torch.nn.functional.cross_entropy)
    assert metrics.compute()["acc_top5"].item() == pytest.approx(expected)
    assert "acc_top5" not in evaluation_metrics(10)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the test needs no callback of the run
def test_a_run_whose_metrics_are_not_given_again_says_so(tmp_path, capsys):
    run, _ = fit_run(tmp_path / "run", module=ImageClassifier(metrics=MulticlassCohenKappa(10), **SETTINGS), epochs=1)
    for metrics in (MulticlassCohenKappa(10), None):
        capsys.readouterr()
        again = ImageClassifier(metrics=metrics, **SETTINGS)
        trainer = quiet_trainer(tmp_path)
        for _ in range(2):
            trainer.test(again, small_data(), ckpt_path=run.last_checkpoint, weights_only=True, verbose=False)
        assert capsys.readouterr().out.count("MulticlassCohenKappa") == (metrics is None)
