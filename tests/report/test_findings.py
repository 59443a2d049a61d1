"""Every number of a report against scikit-learn, SciPy or a sum by hand."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from made_run import CIFAR10, make_run
from scipy import stats
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn import metrics as sk
from sklearn.dummy import DummyClassifier

from cifar_lightning.files import write_json
from cifar_lightning.formatting import percent
from cifar_lightning.report.findings import coverage_of, find, label_issues_of
from cifar_lightning.report.report import make_report
from cifar_lightning.report.results import Predictions, Results, read_results
from cifar_lightning.runs.metrics_table import MetricsTable


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Findings as read back from JSON, and the arrays that they are of."""
    run = make_run(tmp_path_factory.mktemp("runs") / "run")
    findings = find(read_results(run))
    write_json(run.findings, findings)
    arrays = {name: dict(np.load(file)) for name, file in (("test", run.predictions), ("val", run.predictions_val))}
    return json.loads(run.findings.read_text(encoding="utf-8")), arrays["test"], arrays["val"]


def wilson(right, total):
    """The interval by SciPy."""
    interval = stats.binomtest(int(right), int(total)).proportion_ci(method="wilson")
    return [interval.low, interval.high]


def ece(logits, targets):
    """Fifteen bins (a, b], as published."""
    probs = np.exp(log_softmax(logits.astype(np.float64), axis=1))
    confidence, right = probs.max(1), probs.argmax(1) == targets
    total = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def log_loss(logits, targets):
    return -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(targets)), targets].mean()


def test_the_summary(found):
    findings, test, _ = found
    preds, targets = test["logits"].argmax(1), test["targets"]
    summary = findings["summary"]
    assert summary["accuracy"] == sk.accuracy_score(targets, preds)
    dummy = DummyClassifier(strategy="most_frequent").fit(targets[:, None], targets)
    assert summary["majority"] == dummy.score(targets[:, None], targets)
    assert summary["majority_class"] == dummy.predict([[0]])[0]
    assert summary["chance"] == 1 / len(test["class_names"])
    assert summary["num_right"] == (targets == preds).sum()
    assert summary["num_images"] == len(targets)
    assert summary["accuracy_interval_95"] == pytest.approx(wilson((targets == preds).sum(), len(targets)), abs=1e-6)
    assert summary["macro_f1"] == pytest.approx(sk.f1_score(targets, preds, average="macro"))
    assert summary["loss"] == pytest.approx(log_loss(test["logits"], targets))
    assert findings["confusion_matrix"] == sk.confusion_matrix(targets, preds).tolist()


def test_the_classes(found):
    findings, test, _ = found
    preds, targets = test["logits"].argmax(1), test["targets"]
    confidence = np.exp(log_softmax(test["logits"].astype(np.float64), axis=1)).max(1)
    report = sk.classification_report(targets, preds, target_names=list(test["class_names"]), output_dict=True)
    for index, row in enumerate(findings["classes"]):
        theirs = report[row["name"]]
        own = targets == index
        assert [row["precision"], row["recall"], row["f1"]] == pytest.approx(
            [theirs["precision"], theirs["recall"], theirs["f1-score"]]
        )
        assert row["support"] == theirs["support"]
        assert row["predicted"] == (preds == index).sum()
        assert row["recall_interval_95"] == pytest.approx(wilson(row["right"], row["support"]), abs=1e-6)
        assert row["mean_confidence"] == pytest.approx(confidence[own].mean())


def test_calibration_before_and_after_temperature(found):
    findings, test, val = found
    calibration = findings["calibration"]
    best = minimize_scalar(
        lambda log_t: log_loss(val["logits"] / math.exp(log_t), val["targets"]), bounds=(-4, 4), method="bounded"
    )
    assert calibration["temperature"] == pytest.approx(math.exp(best.x), rel=1e-4)
    scaled = test["logits"].astype(np.float64) / calibration["temperature"]
    for key, logits in (("before", test["logits"]), ("after", scaled)):
        assert calibration[key]["ece"] == pytest.approx(ece(logits, test["targets"]), abs=1e-9)
        assert calibration[key]["loss"] == pytest.approx(log_loss(logits, test["targets"]))
        assert sum(part["num_images"] for part in calibration[key]["bins"]) == len(test["targets"])
        assert len(calibration[key]["bins"]) == 15
    assert calibration["after"]["ece"] < calibration["before"]["ece"]
    assert calibration["fitted_on"] == len(val["targets"])
    num_right = {key: sum(part["num_right"] for part in calibration[key]["bins"]) for key in ("before", "after")}
    assert num_right["before"] == num_right["after"] == findings["summary"]["num_right"]


def test_the_temperature_never_sees_the_test(tmp_path):
    run = make_run(tmp_path / "run")
    before = find(read_results(run))["calibration"]["temperature"]
    arrays = dict(np.load(run.predictions))
    np.savez(run.predictions, **{**arrays, "logits": arrays["logits"] * 3})
    assert find(read_results(run))["calibration"]["temperature"] == before


def test_the_confused_pairs_count_both_directions(found):
    findings, test, _ = found
    cm = np.array(findings["confusion_matrix"])
    names = list(test["class_names"])
    totals = []
    for pair in findings["confused_pairs"]:
        i, j = names.index(pair["true"]), names.index(pair["predicted"])
        assert (pair["count"], pair["reverse_count"]) == (cm[i, j], cm[j, i])
        assert pair["share"] == cm[i, j] / cm[i].sum()
        assert pair["reverse_share"] == cm[j, i] / cm[j].sum()
        assert pair["count"] >= pair["reverse_count"]
        totals.append(cm[i, j] + cm[j, i])
    both = np.triu(cm + cm.T, 1)
    assert totals == sorted(both[both > 0].tolist(), reverse=True)[:10]


def test_the_p_values_of_the_insights_are_scipys(found):
    findings, test, val = found
    preds, targets = test["logits"].argmax(1), test["targets"]
    by_kind = {insight["kind"]: insight for insight in findings["insights"]}
    right = preds == targets
    for item in by_kind["hard_classes"]["items"]:
        own = targets == list(test["class_names"]).index(item["numbers"]["class"])
        table = [[(right & own).sum(), (~right & own).sum()], [(right & ~own).sum(), (~right & ~own).sum()]]
        assert item["p"] >= stats.fisher_exact(table).pvalue * 0.999
    (gap,) = by_kind["confidence"]["items"]
    confidence = np.exp(log_softmax(test["logits"].astype(np.float64), axis=1)).max(1)
    mean = (confidence - right).mean()
    assert gap["numbers"]["gap"] == pytest.approx(mean)
    few = stats.poisson_binom(confidence).cdf([right.sum() - 1, right.sum()])
    assert gap["p"] == pytest.approx(min(1, 2 * min(1 - few[0], few[1])), abs=1e-6)
    low, high = gap["numbers"]["interval_95"]
    assert low < mean < high
    assert (low <= 0 <= high) == (gap["p"] >= 0.05)
    (both,) = by_kind["validation_gap"]["items"]
    val_right = val["logits"].argmax(1) == val["targets"]
    table = [[right.sum(), (~right).sum()], [val_right.sum(), (~val_right).sum()]]
    assert both["p"] == pytest.approx(stats.fisher_exact(table).pvalue, rel=1e-4)


def test_the_galleries_show_what_they_say(found):
    findings, test, _ = found
    log_probs = log_softmax(test["logits"].astype(np.float64), axis=1)
    probs, targets, names = np.exp(log_probs), test["targets"], list(test["class_names"])
    position = {int(index): place for place, index in enumerate(test["indices"])}
    galleries = {gallery["title"]: gallery["images"] for gallery in findings["galleries"]}
    wrong = probs.argmax(1) != targets
    mistakes = [position[item["index"]] for item in galleries["Most confident mistakes"]]
    by_confidence, pairs = np.argsort(-probs.max(1), kind="stable").tolist(), findings["confused_pairs"]
    first = [p for p in by_confidence if wrong[p]][:12]
    of_pairs = {position[item["index"]] for pair in pairs for item in pair["images"]}
    assert mistakes == [p for p in by_confidence if wrong[p] and (p in first or p not in of_pairs)][:24]
    assert mistakes[:12] == first
    everywhere = [item["index"] for group in (*pairs, *findings["galleries"]) for item in group["images"]]
    assert len(set(everywhere)) == len(everywhere)
    for group in (*pairs, *findings["galleries"]):
        for item in group["images"]:
            place = position[item["index"]]
            assert item["true"] == names[targets[place]]
            assert item["predicted"] == names[probs[place].argmax()]
            assert item["prob"] == pytest.approx(probs[place].max())
            assert item["prob_of_true"] == pytest.approx(probs[place, targets[place]])
    for pair in pairs[:5]:
        classes = {pair["true"], pair["predicted"]}
        of_pair = [p for p in by_confidence if wrong[p] and {names[targets[p]], names[probs[p].argmax()]} == classes]
        assert [position[index] for index in pair["elsewhere"]] == [p for p in of_pair if p in first]
        assert [position[item["index"]] for item in pair["images"]] == [p for p in of_pair if p not in first][:6]


def test_a_class_that_is_never_predicted_or_not_there_raises_no_warning(tmp_path):
    run = make_run(tmp_path / "run", names=CIFAR10)
    arrays = dict(np.load(run.predictions))
    arrays["logits"][:, 3] = -50  # never a cat
    np.savez(
        run.predictions,
        **{key: values[arrays["targets"] != 5] for key, values in arrays.items() if key != "class_names"},
        class_names=arrays["class_names"],
    )
    findings = find(read_results(run))
    cat, dog = findings["classes"][3], findings["classes"][5]
    assert math.isnan(cat["precision"])
    assert cat["recall"] == cat["f1"] == 0
    assert math.isnan(dog["recall"])
    assert dog["recall_interval_95"] == [0, 1]


def test_a_diverged_model_has_findings_without_numbers_of_calibration(tmp_path):
    run = make_run(tmp_path / "run")
    arrays = dict(np.load(run.predictions))
    np.savez(run.predictions, **{**arrays, "logits": np.full_like(arrays["logits"], np.nan)})
    findings = find(read_results(run))
    assert math.isnan(findings["calibration"]["before"]["ece"])
    assert math.isnan(findings["calibration"]["before"]["ece_by_chance"])
    assert findings["label_check"]["checked"]["test"] == 0
    assert findings["label_check"]["checked"]["val"] > 0
    assert "confidence" not in {insight["kind"] for insight in findings["insights"]}


def test_coverage_is_chosen_on_validation_and_measured_on_test(tmp_path):
    results = read_results(make_run(tmp_path / "run", skill=4, sharpness=1))
    rows = find(results)["coverage"]
    assert [row["target"] for row in rows] == [0.95, 0.99, 0.999]
    confidence, correct = results.test.probs.max(1), results.test.preds == results.test.targets
    val_confidence, val_correct = results.val.probs.max(1), results.val.preds == results.val.targets
    for row in rows:
        assert val_correct[val_confidence >= row["threshold"]].mean() >= row["target"]
        accepted = confidence >= row["threshold"]
        assert row["num_images"] == accepted.sum() == pytest.approx(row["coverage"] * 2000)
        assert row["accuracy"] == correct[accepted].mean()
        assert row["chosen_on"] == "val"
    assert [row["num_images"] for row in rows] == sorted((row["num_images"] for row in rows), reverse=True)
    alone = coverage_of(results.test, None)
    assert {row["chosen_on"] for row in alone} == {"test"}
    assert all(row["accuracy"] >= row["target"] for row in alone)


def test_an_accuracy_that_no_confidence_reaches_has_no_coverage():
    wrong = Predictions(np.array([[5, 0], [0, 9]], np.float32), np.array([1, 0]), np.arange(2), ("a", "b"))
    for row in coverage_of(wrong, wrong):
        assert {row[key] for key in ("threshold", "coverage", "num_images", "accuracy")} == {None}


@pytest.mark.parametrize(("skill", "is_weak"), [(1, True), (8, False)])
def test_a_weak_model_lists_more_labels_than_can_be_wrong(skill, is_weak, tmp_path):
    run = make_run(tmp_path / "run", skill=skill)
    check = find(read_results(run))["label_check"]
    assert check["is_many"] == is_weak == (check["num_issues"] > 300)  # of 3,000
    make_report(run)
    fraction = percent(check["num_issues"] / 3000, 0).removesuffix(" %")
    assert bool(re.search(rf"<b>{fraction}\s% of the images", run.report.read_text(encoding="utf-8"))) == is_weak


def test_mistakes_are_listed_by_loss_with_their_names_up_to_500(tmp_path):
    results = read_results(make_run(tmp_path / "run", n=4000, skill=1))
    test, mistakes = results.test, find(results)["mistakes"]
    losses = -log_softmax(test.logits.astype(float), axis=1)[np.arange(4000), test.targets]
    losses[test.preds == test.targets] = -1
    assert mistakes["count"] == (losses >= 0).sum() > 500
    assert mistakes["named_by"] == "path"
    worst = np.argsort(-losses, kind="stable")[:500]
    assert [image["index"] for image in mistakes["images"]] == worst.tolist()
    assert [image["name"] for image in mistakes["images"]] == [test.names[at] for at in worst]
    np.testing.assert_allclose([image["loss"] for image in mistakes["images"]], losses[worst])
    by_index = replace(test, names=())
    assert find(replace(results, test=by_index))["mistakes"]["named_by"] == "index"


def test_training_is_summed_up(tmp_path):
    training = find(read_results(make_run(tmp_path / "run", epochs=5)))["training"]
    assert training["num_epochs"] == training["best_epoch"] == 5
    assert training["best_val_acc"] == pytest.approx(0.9 * 0.8)
    assert training["elapsed_s"] == pytest.approx(52.5)
    assert training["train_images_per_s"] == 1000.0


def test_the_indices_of_the_splits_stay_out_of_the_findings(tmp_path):
    run = make_run(tmp_path / "run")
    indices = {name: list(range(99)) for name in ("train", "val", "test")}
    write_json(run.split, {"sizes": {"val": 1}, "seed": 3, **indices})
    split = find(read_results(run))["run"]["split"]
    assert set(split) == {"sizes", "seed", "test_indices_sha256"}


def test_the_best_epoch_is_chosen_as_its_checkpoint_was(tmp_path):
    run = make_run(tmp_path / "run", epochs=3)
    rows = MetricsTable(run.metrics_csv).read()
    run.metrics_csv.unlink()
    for row, (accuracy, loss) in zip(rows, ((0.5, 1.0), (0.5, 0.8), (0.5, 0.9)), strict=True):
        MetricsTable(run.metrics_csv).append({**row, "val/acc": accuracy, "val/loss": loss})
    results = read_results(run)
    assert find(results)["training"]["best_epoch"] == 2
    results.origin.config["trainer"] = {"enable_checkpointing": False}  # the last weights were tested
    assert find(results)["training"]["best_epoch"] is None
    results.origin.config["trainer"] = {"val_check_interval": 0.5}  # best.ckpt may be from an epoch's middle
    assert find(results)["training"]["best_epoch"] is None


def test_the_tested_epoch_is_that_of_the_tested_checkpoint_and_of_older_runs_the_best(tmp_path):
    run = make_run(tmp_path / "run", epochs=4)
    rows = MetricsTable(run.metrics_csv).read()
    run.metrics_csv.unlink()
    for row, accuracy in zip(rows, (0.5, 0.9, 0.6, 0.7), strict=True):
        MetricsTable(run.metrics_csv).append({**row, "val/acc": accuracy})
    said = {}
    for recorded, tested in (({}, 2), ({"epoch": 2}, 2), ({"epoch": 4}, 4), ({"epoch": 5}, None)):  # 5 has no row
        write_json(run.test_metrics, recorded)
        training = find(read_results(run))["training"]
        assert (training["best_epoch"], training["best_val_acc"]) == (2, 0.9)
        assert (training["tested_epoch"], training["tested_val_acc"]) == (tested, {2: 0.9, 4: 0.7}.get(tested))
        make_report(run)
        said[tested] = run.report.read_text(encoding="utf-8")
    assert ["best validation accuracy" in said[tested] for tested in (2, 4, None)] == [True, False, False]
    assert "70.00" in said[4]


def test_what_a_cut_table_cannot_tell_is_not_said(tmp_path):
    run = make_run(tmp_path / "run", epochs=5)
    whole = {file: file.read_text().splitlines(keepends=True) for file in (run.metrics_csv, run.timing_csv)}
    run.metrics_csv.write_text("".join(whole[run.metrics_csv][:3]))
    training = find(read_results(run))["training"]
    assert (training["num_epochs"], training["is_whole"]) == (5, False)
    assert training["elapsed_s"] == pytest.approx(52.5)
    run.metrics_csv.write_text("".join(whole[run.metrics_csv]))
    run.timing_csv.write_text("".join(whole[run.timing_csv][:3]))
    training = find(read_results(run))["training"]
    assert (training["num_epochs"], training["is_whole"], training["elapsed_s"]) == (5, True, None)


def test_the_time_is_not_summed_up_where_that_of_an_epoch_is_not_known(tmp_path):
    run = make_run(tmp_path / "run", epochs=3)
    run.timing_csv.write_text(run.timing_csv.read_text().replace("10.5", "nan", 1))
    assert find(read_results(run))["training"]["elapsed_s"] is None


def test_the_members_of_many_groups_are_all_there(tmp_path):
    names = [f"class_{index:02}" for index in range(20)]  # neighbours are confused
    findings = find(read_results(make_run(tmp_path / "run", names=names, n=4000, skill=4)))
    (groups,) = (insight["groups"] for insight in findings["insights"] if insight["kind"] == "groups")
    assert len(groups) > 4
    assert {name for members in groups.values() for name in members} <= set(names)
    assert all(len(members) > 1 for members in groups.values())


def test_label_issues_are_of_both_splits_by_name_the_least_plausible_first(found):
    findings, test, val = found
    issues, arrays = findings["label_issues"], {"test": test, "val": val}
    assert findings["label_check"] == {
        "checked": {"val": len(val["targets"]), "test": len(test["targets"])},
        "num_issues": len(issues),
        "is_reliable": True,
        "is_many": len(issues) > 0.1 * (len(val["targets"]) + len(test["targets"])),
    }
    assert {issue["split"] for issue in issues} == {"val", "test"}
    assert issues == sorted(issues, key=lambda issue: issue["prob_of_label"])
    for issue in issues:
        of = arrays[issue["split"]]
        (row,) = np.flatnonzero(of["indices"] == issue["index"])
        probs = np.exp(log_softmax(of["logits"][row].astype(float)))
        names = of["class_names"].tolist()
        assert issue["name"] == str(of["names"][row])
        assert issue["label"] == names[of["targets"][row]]
        assert issue["suggested"] == names[probs.argmax()] != issue["label"]
        assert issue["prob_of_label"] == pytest.approx(probs[of["targets"][row]], rel=1e-6)


def test_label_issues_of_a_model_no_better_than_the_largest_class_are_not_reliable():
    logits = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)
    guesses = Predictions(logits, np.arange(200) % 2, np.arange(200), ("ant", "bee"))
    check = find(Results(guesses.class_names, guesses.confusion, test=guesses))["label_check"]
    assert check["num_issues"] > 0
    assert not check["is_reliable"]


def test_without_validation_predictions_the_test_images_alone_are_checked(tmp_path):
    run = make_run(tmp_path / "run")
    run.predictions_val.unlink()
    findings = find(read_results(run))
    assert findings["label_check"]["checked"] == {"test": 2000}
    assert {issue["split"] for issue in findings["label_issues"]} == {"test"}


def test_predictions_that_are_not_finite_are_no_label_issues():
    logits = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    logits[:50, 1] = np.nan
    predictions = Predictions(logits, np.arange(200) % 3, np.arange(200), ("a", "b", "c"))
    issues = label_issues_of({"test": predictions})
    assert issues
    assert min(issue["index"] for issue in issues) >= 50


def test_the_learning_rate_is_that_of_each_step_over_the_epochs_done(tmp_path):
    run = make_run(tmp_path / "run", epochs=4)  # of ten steps
    lrs = json.loads(run.learning_rates.read_text())["lr"]
    found = find(read_results(run))["learning_rates"]
    assert [epoch for epoch, _ in found] == pytest.approx([step / 10 for step in range(40)])
    assert [lr for _, lr in found] == lrs
    run.learning_rates.unlink()
    found = find(read_results(run))
    assert found["learning_rates"] == [(row["epoch"] + 1, row["lr"]) for row in found["epochs"]]


def test_learning_rates_of_an_unfinished_epoch_are_spread_over_it(tmp_path):
    run = make_run(tmp_path / "run", n=100, epochs=3)  # of 10 steps
    for file in (run.metrics_csv, run.timing_csv):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    found = find(read_results(run))["learning_rates"]
    assert [done for done, _ in found] == pytest.approx(np.arange(30) / 10)
