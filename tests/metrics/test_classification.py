import json
import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from made_run import made_predictions
from sklearn import metrics as sk
from torchmetrics.classification import MulticlassF1Score

from cifar_lightning.metrics import classification
from cifar_lightning.metrics.calibration import softmax
from cifar_lightning.metrics.significance import wilson_interval
from cifar_lightning.training.eval_metrics import evaluation_metrics, update_evaluation

LOGITS, TARGETS = made_predictions(10, 2000, skill=2, sharpness=1)
PREDS = LOGITS.argmax(axis=1)
CM = classification.confusion_matrix(TARGETS, PREDS, 10)


def test_the_confusion_matrix_has_true_classes_on_its_rows():
    cm = classification.confusion_matrix(np.array([0, 0, 2]), np.array([0, 1, 1]), 3)
    assert cm.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0]]
    assert cm.dtype == np.int64
    assert (sk.confusion_matrix(TARGETS, PREDS) == CM).all()


def test_a_class_outside_the_range_is_refused_and_not_counted_elsewhere():
    for targets, preds in (([0, 3], [0, 0]), ([0, 0], [0, 3]), ([0, -1], [0, 0])):
        with pytest.raises(ValueError, match="not in 0"):
            classification.confusion_matrix(np.array(targets), np.array(preds), 3)
    with pytest.raises((ValueError, TypeCheckError)):
        classification.confusion_matrix(np.array([0, 1]), np.array([0]), 3)


def test_rates_equal_scikit_learns():
    precision, recall, f1, support = sk.precision_recall_fscore_support(TARGETS, PREDS)
    rates = classification.per_class(CM)
    np.testing.assert_allclose(rates.precision, precision, rtol=1e-12)
    np.testing.assert_allclose(rates.recall, recall, rtol=1e-12)
    np.testing.assert_allclose(rates.f1, f1, rtol=1e-12)
    np.testing.assert_array_equal(rates.support, support)
    np.testing.assert_array_equal(rates.predicted, np.bincount(PREDS, minlength=10))
    assert classification.accuracy(CM) == sk.accuracy_score(TARGETS, PREDS)


def test_a_class_never_predicted_has_no_precision_and_an_f1_of_zero():
    rates = classification.per_class(np.array([[3, 1, 0, 0], [0, 2, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]))
    assert np.isnan(rates.precision).tolist() == [False, False, True, True]
    assert np.isnan(rates.recall).tolist() == [False, False, False, True]
    assert rates.recall[2] == rates.f1[2] == 0.0
    assert np.isnan(rates.f1).tolist() == [False, False, False, True]


def test_nothing_at_all_gives_nan_without_a_warning():
    empty = np.zeros((3, 3), dtype=np.int64)
    assert math.isnan(classification.accuracy(empty))
    assert math.isnan(classification.macro_f1(empty))
    assert classification.most_confused(empty) == []


@pytest.mark.parametrize("absent", [False, True])
def test_macro_f1_equals_scikit_learn_and_torchmetrics_also_with_an_absent_class(absent):
    num_classes = 12 if absent else 10  # nobody is of class 10 or 11
    cm = classification.confusion_matrix(TARGETS, PREDS, num_classes)
    theirs = MulticlassF1Score(num_classes, average="macro")(torch.tensor(PREDS), torch.tensor(TARGETS)).item()
    assert classification.macro_f1(cm) == pytest.approx(sk.f1_score(TARGETS, PREDS, average="macro"), rel=1e-12)
    assert classification.macro_f1(cm) == pytest.approx(theirs, rel=1e-6)


def test_most_confused_counts_mistakes_alone_the_largest_first_and_ties_in_class_order():
    cm = np.array([[90, 2, 8], [0, 0, 0], [8, 0, 12]])
    before = cm.copy()
    pairs = classification.most_confused(cm)
    assert [(pair.true, pair.pred, pair.count, pair.fraction) for pair in pairs] == [
        (0, 2, 8, 0.08),
        (2, 0, 8, 0.4),
        (0, 1, 2, 0.02),
    ]
    assert len(classification.most_confused(cm, top=1)) == 1
    assert (cm == before).all()


def test_test_metrics_agree_with_references_and_are_plain_types():
    names = [f"class {index}" for index in range(10)]
    metrics = classification.test_metrics(LOGITS, TARGETS, names)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    report = sk.classification_report(TARGETS, PREDS, target_names=names, output_dict=True)
    assert metrics["accuracy"] == report["accuracy"]
    assert metrics["accuracy_interval_95"] == list(wilson_interval(int((PREDS == TARGETS).sum()), 2000))
    assert metrics["num_images"] == 2000
    assert metrics["macro_f1"] == pytest.approx(report["macro avg"]["f1-score"], rel=1e-12)
    assert metrics["loss"] == pytest.approx(sk.log_loss(TARGETS, softmax(LOGITS)), rel=1e-9)
    assert list(metrics["per_class"]) == names
    for name in names:
        ours, theirs = metrics["per_class"][name], report[name]
        assert ours["support"] == theirs["support"]
        assert ours["precision"] == pytest.approx(theirs["precision"], rel=1e-12)
        assert ours["recall"] == pytest.approx(theirs["recall"], rel=1e-12)
        assert ours["f1"] == pytest.approx(theirs["f1-score"], rel=1e-12)
    worst = metrics["most_confused"][0]
    off_diagonal = CM - np.diag(np.diag(CM))
    assert worst["count"] == off_diagonal.max()
    assert off_diagonal[names.index(worst["true"]), names.index(worst["predicted"])] == worst["count"]
    assert worst["share"] == worst["count"] / metrics["per_class"][worst["true"]]["support"]


def test_what_has_no_value_is_none_and_a_diverged_model_is_measured_without_warnings():
    logits = np.full((4, 3), np.nan, dtype=np.float32)
    metrics = classification.test_metrics(logits, np.array([0, 0, 1, 1]), ["a", "b", "c"])
    assert metrics["loss"] is None
    assert metrics["ece"] is None
    assert metrics["per_class"]["b"]["precision"] is None
    assert metrics["per_class"]["c"] == {"support": 0, "precision": None, "recall": None, "f1": None}
    assert classification.test_metrics(np.array([[np.inf, 0.0]]), np.array([0]), ["a", "b"])["loss"] is None


def test_names_that_do_not_fit_the_logits_are_refused():
    for names in (["a"] * 10, ["a", "b"]):
        with pytest.raises(ValueError, match="distinct names"):
            classification.test_metrics(LOGITS, TARGETS, names)
    with pytest.raises(ValueError, match="no images"):
        classification.test_metrics(LOGITS[:0], TARGETS[:0], [str(index) for index in range(10)])


@pytest.mark.parametrize(
    "scores", [np.zeros((12, 12)), np.eye(12) < 0, np.random.default_rng(0).integers(0, 3, (400, 12))]
)
def test_ties_of_the_top_5_are_broken_as_argmax_breaks_them(scores):
    scores = scores.astype(np.float32)
    num_images, num_classes = scores.shape
    for target in range(num_classes):
        targets = np.full(num_images, target)
        top, left = np.zeros(num_images, bool), scores.copy()
        for _ in range(classification.TOP_K):  # the best one, then the best of the others
            best = left.argmax(1)
            top |= best == target
            left[np.arange(num_images), best] = -np.inf
        assert classification.top_k_accuracy(scores, targets) == top.mean()
        metrics = evaluation_metrics(num_classes)
        tensors = torch.from_numpy(scores), torch.from_numpy(targets)
        update_evaluation(metrics, tensors[0], *tensors, torch.nn.functional.cross_entropy)
        assert metrics["acc_top5"].compute().item() == pytest.approx(top.mean())
