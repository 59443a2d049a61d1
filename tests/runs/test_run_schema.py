"""Upgrade of the files of older runs."""

from made_run import make_run

from cifar_lightning.checkpoints.resume import find_changes
from cifar_lightning.cli.flags import check_config
from cifar_lightning.files import write_json
from cifar_lightning.report.results import read_results
from cifar_lightning.runs.environment import describe_environment
from cifar_lightning.runs.schema import upgrade_config, upgrade_test_metrics

CURRENT = "model:\n  name: speednet\n  tta: mirror\n  stem_train_fraction: 0.5\ndata:\n  seed: 0\n"
OLD = CURRENT.replace("stem_train_fraction", "stem_share")


def test_files_of_version_1_are_read_as_those_of_version_2():
    assert upgrade_config({"model": {"stem_share": 0.5, "lr": 1}}) == {"model": {"stem_train_fraction": 0.5, "lr": 1}}
    old = {"accuracy_one_view": 0.5, "num_pictures": 9}
    assert upgrade_test_metrics(old) == {"accuracy_no_tta": 0.5, "num_images": 9}
    for other in (None, [], "text", {}, {"model": None}, {"model": {"lr": 1}}, {"data": {"stem_share": 1}}):
        assert upgrade_config(other) == other


def test_a_new_run_carries_its_version():
    assert describe_environment()["schema_version"] == 2


def test_an_old_run_is_analyzed_and_resumed_with_its_settings(tmp_path):
    run = make_run(tmp_path)
    run.config.write_text(OLD)
    write_json(run.test_metrics, {"accuracy_one_view": 0.25})
    results = read_results(run)
    assert results.origin.config["model"]["stem_train_fraction"] == 0.5
    assert results.accuracy_no_tta == 0.25
    assert find_changes(run, CURRENT) == {}
    assert find_changes(run, CURRENT.replace("0.5", "1.0")) == {"model.stem_train_fraction": (0.5, 1.0)}
    check_config(run.config)
