"""Comparison of several runs: every number against SciPy and statistics, refusals, the page."""

import itertools
import re
import shutil
import statistics

import numpy as np
import pytest
import yaml
from made_run import make_run
from scipy import stats

from cifar_lightning.cli import main as cli
from cifar_lightning.errors import UserError
from cifar_lightning.files import write_json, write_text_durably
from cifar_lightning.metrics.significance import mean_interval, spread
from cifar_lightning.report.several_runs import compare_runs
from cifar_lightning.runs.contents import read_json
from cifar_lightning.runs.folder import RunFolder

SEEDS = {0.003: (0, 1, 2), 0.1: (2, 0, 1)}  # in another order


def configure(run, lr, seed, **data):
    config = {"seed_everything": seed, "model": {"lr": lr}, "data": {"seed": 0, "order_seed": seed, **data}}
    write_text_durably(run.config, yaml.safe_dump(config))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two folders of three seeds each, with other learning rates."""
    root = tmp_path_factory.mktemp("runs")
    for number, (lr, seeds) in enumerate(SEEDS.items(), 1):
        for seed in seeds:
            skill = 2.5 + number / 10 + seed / 20
            run = make_run(root / "net" / str(number) / str(seed), n=300, seed=10 * number + seed, skill=skill)
            configure(run, lr, seed)
            write_json(run.environment, {"num_parameters": 1234 * number})
        write_json(root / "net" / str(number) / "seeds.json", {"seeds": list(seeds)})
    return root / "net"


@pytest.fixture
def folders(made, tmp_path):
    return shutil.copytree(made, tmp_path / "net")


def runs_of(*folders):
    return [RunFolder(path) for folder in folders for path in sorted(folder.glob("[0-9]"))]


def correct(run):
    arrays = np.load(run.predictions)
    order = np.argsort(arrays["indices"])
    return (arrays["logits"].argmax(1) == arrays["targets"])[order]


def test_every_number_is_that_of_an_independent_computation(folders):
    runs = runs_of(folders / "1", folders / "2")
    arrays = dict(np.load(runs[3].predictions))  # in another order, as several processes may write them
    order = np.random.default_rng(0).permutation(len(arrays["targets"]))
    names = ("logits", "targets", "indices")
    np.savez(runs[3].predictions, **{**arrays, **{name: arrays[name][order] for name in names}})
    compare_runs(runs, [], RunFolder(folders))
    found = read_json(folders / "comparison.json")
    accuracies = [float(correct(run).mean()) for run in runs]
    assert [row["accuracy"] for row in found["runs"]] == pytest.approx(accuracies)
    assert [row["num_parameters"] for row in found["runs"]] == [1234] * 3 + [2468] * 3
    assert [row["elapsed_s"] for row in found["runs"]] == [52.5] * 6
    assert found["settings"] == ["model.lr"]
    assert [row["settings"]["model.lr"] for row in found["runs"]] == ["0.003"] * 3 + ["0.1"] * 3
    assert [group["name"] for group in found["groups"]] == ["net/1", "net/2"]
    for group, values in zip(found["groups"], (accuracies[:3], accuracies[3:]), strict=True):
        expected = [3, statistics.mean(values), statistics.stdev(values), min(values), max(values)]
        assert [group[key] for key in ("n", "mean", "std", "min", "max")] == pytest.approx(expected)
    (paired,) = found["by_seed"]
    test = stats.ttest_rel(accuracies[:3], accuracies[3:])
    assert (paired["n"], paired["difference"]) == (3, pytest.approx(np.mean(accuracies[:3]) - np.mean(accuracies[3:])))
    assert paired["interval_95"] == pytest.approx(test.confidence_interval(0.95))
    plain = []
    pairs = list(itertools.combinations(runs, 2))
    for row, (one, other) in zip(found["pairs"], pairs, strict=True):
        first, second = correct(one), correct(other)
        only = [int((first & ~second).sum()), int((~first & second).sum())]
        assert [row["only_first"], row["only_second"]] == only
        assert row["difference"] == pytest.approx(first.mean() - second.mean())
        plain.append(stats.binomtest(only[0], sum(only)).pvalue)
    by_size = np.argsort(plain, kind="stable")
    holm = np.maximum.accumulate([min(1, (15 - rank) * plain[index]) for rank, index in enumerate(by_size)])
    assert [found["pairs"][index]["p"] for index in by_size] == pytest.approx(holm.tolist())


def test_spread_and_interval_of_few_values():
    assert spread([0.5]) == {"n": 1, "mean": 0.5, "std": None, "min": 0.5, "max": 0.5}
    assert mean_interval([0.5]) is None
    assert mean_interval([0.25, 0.25]) == (0.25, 0.25)
    values = [0.1, -0.2, 0.4, 0.05]
    assert mean_interval(values) == pytest.approx(stats.ttest_1samp(values, 0).confidence_interval(0.95))


def test_only_seeds_that_both_have_are_paired_also_those_of_runs_without_order_seed(folders):
    runs = runs_of(folders / "1", folders / "2")
    configure(runs[4], 0.1, 7)
    config = {"seed_everything": 0, "model": {"lr": 0.1}, "data": {"seed": 0}}
    write_text_durably(runs[3].config, yaml.safe_dump(config))  # seed 0 of a plain fit
    compare_runs(runs, [], RunFolder(folders))
    (paired,) = read_json(folders / "comparison.json")["by_seed"]
    accuracies = [correct(run).mean() for run in runs]
    differences = [accuracies[0] - accuracies[3], accuracies[2] - accuracies[5]]
    assert (paired["n"], paired["difference"]) == (2, pytest.approx(np.mean(differences)))


def test_of_many_runs_the_first_is_compared_with_each(folders):
    runs = [folders / "1" / "0"]
    for number in range(15):
        runs.append(shutil.copytree(runs[0], folders / f"copy{number}"))
    compare_runs(list(map(RunFolder, runs)), [], RunFolder(folders))
    pairs = read_json(folders / "comparison.json")["pairs"]
    assert [pair["second"] for pair in pairs] == [f"copy{number}" for number in range(15)]
    assert {pair["p"] for pair in pairs} == {1.0}


def test_other_test_images_are_refused_with_the_name_of_the_run(folders):
    other = make_run(folders / "other", n=200)
    with pytest.raises(UserError, match="other: not tested on the same images"):
        compare_runs([*runs_of(folders / "1"), other], [], RunFolder(folders))
    assert not (folders / "comparison.html").exists()


def test_runs_of_one_seed_count_once_and_runs_without_a_config_are_no_group(folders):
    copy = RunFolder(shutil.copytree(folders / "1" / "0", folders / "copy"))
    without = [RunFolder(shutil.copytree(folders / "1" / str(seed), folders / f"without{seed}")) for seed in (0, 1)]
    for run in without:
        run.config.unlink()
    write_json(without[0].split, {"sizes": {"test": 300}})
    compare_runs([*runs_of(folders / "1"), copy, *without], [], RunFolder(folders))
    found = read_json(folders / "comparison.json")
    assert [(group["name"], group["n"]) for group in found["groups"]] == [
        ("net/1/0", 3),
        ("without0", 1),
        ("without1", 1),
    ]
    assert sum("without0" in problem and "split.json" in problem for problem in found["problems"]) == 1


def test_runs_without_a_seed_are_of_no_group_and_in_no_pair(folders):
    runs = runs_of(folders / "1", folders / "2")
    for run in runs[:2]:
        configure(run, 0.003, False)
    compare_runs(runs, [], RunFolder(folders))
    found = read_json(folders / "comparison.json")
    assert sorted(group["n"] for group in found["groups"]) == [1, 1, 1, 3]
    assert found["by_seed"] == [], "seed 2 alone is common"


def test_names_and_settings_of_a_stranger_are_escaped(folders):
    run = RunFolder(shutil.copytree(folders / "1" / "0", folders / "<script>alert(1)</script>"))
    config = {"model": {"lr": '"><img src=x onerror=alert(2)>', "$\\frac{": "\x1b[31m"}, "seed_everything": [1, "<b>"]}
    write_text_durably(run.config, yaml.safe_dump(config))
    run.environment.write_text('{"num_parameters": "<i>"}')
    compare_runs([*runs_of(folders / "1"), run], [], RunFolder(folders))
    page = (folders / "comparison.html").read_text()
    for text in ("<script>alert", "<img", "<b>", "<i>", "\x1b"):
        assert text not in page
    assert "&lt;script&gt;alert(1)" in page


def test_analyze_expands_folders_of_seeds_and_compares_two_runs_as_before(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    assert cli.run_command(["analyze", "1", "--compare", "2"]) == 0
    assert len(read_json(folders / "1" / "comparison.json")["runs"]) == 6
    assert "net/2/2" in capsys.readouterr().out
    assert cli.run_command(["analyze", "1/0", "--compare", "1", "2/0"]) == 0
    names = [row["name"] for row in read_json(folders / "1" / "0" / "comparison.json")["runs"]]
    assert names == ["net/1/0", "net/1/1", "net/1/2", "net/2/0"]
    assert not (folders / "1" / "0" / "findings.json").exists()
    assert cli.run_command(["analyze", "1/0", "--compare", "2/0"]) == 0
    assert read_json(folders / "1" / "0" / "findings.json")["comparison"]["runs"][1]["path"] == "2/0"
    with pytest.raises(UserError, match="--compare 1/0"):
        cli.run_command(["analyze", "1/0", "--compare", "1/0"])


def test_runs_of_a_folder_of_seeds_that_are_not_tested_are_left_out_and_named(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    (folders / "1" / "1" / "predictions.npz").unlink()
    (folders / "1" / "1" / "confusion_matrix.csv").unlink(missing_ok=True)
    shutil.rmtree(folders / "2" / "2")
    assert cli.run_command(["analyze", "1", "--compare", "2"]) == 0
    found = read_json(folders / "1" / "comparison.json")
    assert len(found["runs"]) == 4
    assert [problem.split(":")[0] for problem in found["problems"]] == ["1/1", "2/2"]
    with pytest.raises(UserError, match="1/1"):  # named by itself
        cli.run_command(["analyze", "1/0", "--compare", "2/0", "1/1"])
    shutil.rmtree(folders / "2" / "1")
    capsys.readouterr()
    assert cli.run_command(["analyze", "2"]) == 0  # the report of the run that is left
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(":")[0] for line in lines if "left out" in line} == {"2/1", "2/2"}
    shutil.rmtree(folders / "2" / "0")
    for paths in (["2"], ["2", "--compare", "1/0"], ["1/0", "--compare", "2"], ["1", "--compare", "2"]):
        with pytest.raises(UserError, match=r"^2: none of its runs is tested yet; .*--resume 2"):
            cli.run_command(["analyze", *paths])


def transforms(middle):
    names = ("RandomResizedCrop", middle, "RandomHorizontalFlip")
    return {"data": {"transforms": [{"class_path": f"torchvision.transforms.v2.{name}"} for name in names]}}


def optimizer(**further):
    return {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9, **further}}}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (transforms("RandomGrayscale"), transforms("ColorJitter")),
        (optimizer(nesterov=True, dampening=0), optimizer(nesterov=True, dampening=0.0, maximize=False)),
        ({"model": {"model_kwargs": {"widths": [32] * 40}}}, {"model": {"model_kwargs": {"widths": [32] * 41}}}),
    ],
    ids=["transforms", "optimizer", "model_kwargs"],
)
def test_runs_whose_settings_differ_where_the_text_of_them_does_not_are_no_seeds_of_each_other(one, other, folders):
    runs = runs_of(folders / "1")
    for run, seed, config in zip(runs, (0, 1, 2), (one, one, other), strict=True):
        write_text_durably(run.config, yaml.safe_dump({"seed_everything": seed, **config}))
    compare_runs(runs, [], RunFolder(folders))
    found = read_json(folders / "comparison.json")
    assert len(found["settings"]) == 1
    assert [group["n"] for group in found["groups"]] == [2, 1]
    assert [row["group"] for row in found["runs"]] == [0, 0, 1]


def test_no_two_runs_and_no_two_groups_have_one_name(folders, tmp_path):
    paths = [folders / str(number) / str(seed) for number in (1, 2) for seed in (0, 1)]
    runs = [RunFolder(shutil.copytree(path, folders / "all" / str(at))) for at, path in enumerate(paths)]
    elsewhere = RunFolder(shutil.copytree(paths[0], tmp_path / "elsewhere" / "all" / "0"))
    configure(elsewhere, 0.5, 0)
    compare_runs([*runs, elsewhere], [], RunFolder(folders))
    found = read_json(folders / "comparison.json")
    names, groups = ([row["name"] for row in found[key]] for key in ("runs", "groups"))
    assert names == [str(runs[0].path), "all/1", "all/2", "all/3", str(elsewhere.path)]
    assert groups == [str(runs[0].path), str(runs[2].path), str(elsewhere.path)]
    (paired,) = found["by_seed"]
    assert [paired["first"], paired["second"]] == groups[:2]


def test_equal_differences_of_seeds_have_no_interval_and_are_not_marked_as_sure(folders, capsys):
    runs = runs_of(folders / "1", folders / "2")
    for run, num_correct in zip(runs, (200, 210, 217, 203, 213, 220), strict=True):  # of 300
        arrays = dict(np.load(run.predictions))
        preds = (arrays["targets"] + (np.arange(300) >= num_correct)) % 10
        np.savez(run.predictions, **{**arrays, "logits": np.eye(10, dtype=np.float32)[preds]})
    compare_runs(runs, [], RunFolder(folders))
    (paired,) = read_json(folders / "comparison.json")["by_seed"]
    assert (paired["n"], paired["difference"], paired["interval_95"]) == (3, pytest.approx(-0.01), None)
    page = (folders / "comparison.html").read_text(encoding="utf-8")
    (table,) = re.findall(r"<h3>Paired by seed</h3>.*?</table>", page, re.DOTALL)
    assert ">-1.00<" in table
    assert "sure" not in table
    (said,) = re.findall(r"paired by seed \(n = 3\): -1\.00 points(.*?)\)\.", " ".join(capsys.readouterr().out.split()))
    assert "interval" not in said
