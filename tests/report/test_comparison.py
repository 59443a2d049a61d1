import numpy as np
import pytest
import yaml
from made_run import make_run
from scipy import stats

from cifar_lightning.errors import UserError
from cifar_lightning.files import write_json
from cifar_lightning.report.comparison import compare
from cifar_lightning.report.results import read_results


@pytest.fixture
def runs(tmp_path):
    return make_run(tmp_path / "one"), make_run(tmp_path / "two", seed=1, skill=2.2)


def compared(one, two):
    return compare(one.path, read_results(one), two.path, read_results(two))


def right(run):
    arrays = np.load(run.predictions)
    return arrays["logits"].argmax(1) == arrays["targets"]


def test_mcnemar_and_the_counts_are_those_of_the_paired_predictions(runs):
    result = compared(*runs)
    first, second = (right(run) for run in runs)
    only = ((first & ~second).sum(), (~first & second).sum())
    assert (result["only_first"], result["only_second"]) == only
    assert result["both_right"] == (first & second).sum()
    assert result["both_wrong"] == (~first & ~second).sum()
    assert result["p"] == pytest.approx(stats.binomtest(int(only[0]), int(sum(only))).pvalue, rel=1e-6)
    assert result["difference"] == pytest.approx(first.mean() - second.mean())
    low, high = result["difference_interval_95"]
    # Close to the plain interval of paired differences, which is good enough at this size.
    share = np.array(only) / len(first)
    margin = 1.96 * np.sqrt((share.sum() - (share[0] - share[1]) ** 2) / len(first))
    assert [low, high] == pytest.approx([result["difference"] - margin, result["difference"] + margin], abs=0.002)
    assert result["changed"]["won"]["count"] == only[0]
    assert result["changed"]["lost"]["count"] == only[1]


def test_each_class_has_its_own_test_with_holms_correction(runs):
    result = compared(*runs)
    targets = np.load(runs[0].predictions)["targets"]
    first, second = (right(run) for run in runs)
    plain = []
    for index, row in enumerate(result["classes"]):
        own = targets == index
        assert row["first"] == pytest.approx(first[own].mean())
        assert row["difference"] == pytest.approx(first[own].mean() - second[own].mean())
        assert row["difference_interval_95"][0] <= row["difference"] <= row["difference_interval_95"][1]
        only = ((first & ~second)[own].sum(), (~first & second)[own].sum())
        assert (row["only_first"], row["only_second"]) == only
        plain.append(stats.binomtest(int(only[0]), int(sum(only))).pvalue)
    assert min(row["p"] for row in result["classes"]) == pytest.approx(min(1, 10 * min(plain)), rel=1e-6)


def test_the_other_way_round_everything_is_mirrored(runs):
    there, back = compared(*runs), compared(*reversed(runs))
    assert back["difference"] == pytest.approx(-there["difference"])
    assert back["difference_interval_95"] == pytest.approx([-end for end in reversed(there["difference_interval_95"])])
    assert back["p"] == pytest.approx(there["p"])
    assert back["only_first"] == there["only_second"]


def test_a_run_against_its_copy_differs_in_nothing(runs, tmp_path):
    result = compared(runs[0], make_run(tmp_path / "copy"))
    assert result["difference"] == 0
    assert result["p"] == 1
    assert result["changed"]["won"] == {"count": 0, "indices": [], "images": []}


def test_the_order_of_the_predictions_does_not_matter(runs):
    before = compared(*runs)
    arrays = dict(np.load(runs[1].predictions))
    order = np.random.default_rng(0).permutation(2000)
    shuffled = {name: values if name == "class_names" else values[order] for name, values in arrays.items()}
    np.savez(runs[1].predictions, **shuffled)
    after = compared(*runs)
    assert after["only_first"] == before["only_first"]
    assert after["changed"] == before["changed"]


def test_images_that_one_run_misclassifies_are_shown_with_both_predictions(runs):
    result = compared(*runs)
    arrays = [np.load(run.predictions) for run in runs]
    names = arrays[0]["class_names"]
    for image in result["changed"]["won"]["images"]:
        index = image["index"]
        assert image["true"] == image["first"] == names[arrays[0]["targets"][index]]
        assert image["second"] == names[arrays[1]["logits"][index].argmax()]
        assert image["second"] != image["true"]
    assert result["changed"]["lost"]["images"]


def test_all_images_that_one_run_misclassifies_are_listed_also_those_that_no_run_kept(runs):
    result = compared(*runs)
    first, second = (right(run) for run in runs)
    kept = {int(index) for run in runs for index in np.load(run.gallery)["indices"]}
    for key, changed in (("won", first & ~second), ("lost", ~first & second)):
        indices = result["changed"][key]["indices"]
        assert sorted(indices) == np.flatnonzero(changed).tolist()
        assert set(indices) - kept
        shown = [image["index"] for image in result["changed"][key]["images"]]
        assert shown == [index for index in indices if index in kept][:24]


def test_runs_are_called_by_their_number_and_recipe(tmp_path):
    one, two = make_run(tmp_path / "runs" / "made" / "1"), make_run(tmp_path / "chosen", seed=1)
    assert [run["name"] for run in compared(one, two)["runs"]] == ["made/1", "chosen"]


def test_other_test_images_are_refused(runs, tmp_path):
    for other in (
        make_run(tmp_path / "fewer", n=1000),
        make_run(tmp_path / "classes", names=("ant", "bee")),
        make_run(tmp_path / "names", names=[f"class_{index}" for index in range(10)]),
    ):
        with pytest.raises(UserError, match=r"--compare .*not tested on the same images"):
            compared(runs[0], other)


def test_the_same_number_of_other_images_is_refused_by_their_hash_or_numbers(runs):
    for run, digest in zip(runs, ("aa", "bb"), strict=True):
        write_json(run.split, {"sizes": {"val": 1}, "sha256": {"test": digest}})
    with pytest.raises(UserError, match="the images themselves differ"):
        compared(*runs)
    for run in runs:
        write_json(run.split, {"sizes": {"val": 1}})
    assert compared(*runs)["unchecked"]
    arrays = dict(np.load(runs[1].predictions))
    np.savez(runs[1].predictions, **{**arrays, "indices": arrays["indices"] + 1})
    with pytest.raises(UserError, match="different indices or labels"):
        compared(*runs)


@pytest.mark.parametrize(
    "settings", [{"image_size": (32, 64)}, {"resize": ("crop", "pad")}, {"in_channels": (3, 1)}], ids=str
)
def test_the_same_files_decoded_otherwise_are_compared_by_their_names_and_labels(settings, runs):
    ((name, values),) = settings.items()
    for run, value, sha256 in zip(runs, values, ("aa", "bb"), strict=True):
        run.config.write_text(yaml.safe_dump({"data": {"dataset": "folder", name: value}}))
        write_json(run.split, {"sizes": {"val": 1}, "sha256": {"test": sha256}})
    said = compared(*runs)["unchecked"]
    assert f"--data.{name}" in said
    assert all(str(run.path) in said for run in runs)
    arrays = dict(np.load(runs[1].predictions))
    np.savez(runs[1].predictions, **{**arrays, "names": np.char.replace(arrays["names"], "00007", "70000")})
    with pytest.raises(UserError, match="the images have other names"):
        compared(*runs)
    np.savez(runs[1].predictions, **{key: values for key, values in arrays.items() if key != "names"})
    assert compared(*runs)["unchecked"] == said, "an older run has no names"


@pytest.mark.parametrize(
    ("settings", "is_refused"), [({"image_size": (32, 64)}, False), ({"in_channels": (3, 1)}, True)]
)
def test_images_without_files_whose_hashes_differ_are_refused_unless_their_size_differs(settings, is_refused, runs):
    ((name, values),) = settings.items()  # before they become gray, the same images have the same hash
    for run, value, sha256 in zip(runs, values, ("aa", "bb"), strict=True):
        run.config.write_text(yaml.safe_dump({"data": {"dataset": "<ndarray>", name: value}}))
        write_json(run.split, {"sizes": {"val": 1}, "sha256": {"test": sha256}})
        arrays = dict(np.load(run.predictions))
        np.savez(run.predictions, **arrays | {"names": [f"test[{index}]" for index in arrays["indices"]]})
    if is_refused:
        with pytest.raises(UserError, match="the images themselves differ"):
            compared(*runs)
    else:
        assert "indices and labels" in compared(*runs)["unchecked"]


def test_images_that_were_kept_in_another_size_are_decoded_otherwise(runs, tmp_path):
    larger = make_run(tmp_path / "larger", seed=1, image_size=48)
    write_json(larger.split, {"sizes": {"val": 1}, "sha256": {"test": "other pixels"}})
    assert "--data.image_size" in compared(runs[0], larger)["unchecked"]


def test_test_splits_of_the_same_training_images_are_refused_if_drawn_differently(runs):
    def draw(run, indices, sha256="aa"):
        write_json(run.split, {"sizes": {"val": 1}, "sha256": {"train": sha256}, "train": [0], "test": indices})

    for run in runs:
        draw(run, [1, 2])
    assert compared(*runs)["unchecked"] == ""
    draw(runs[1], [1, 3])
    with pytest.raises(UserError, match=r"drawn differently \(--data\.seed, --data\.test_fraction"):
        compared(*runs)
    draw(runs[1], [1, 2], "bb")
    with pytest.raises(UserError, match="the images themselves differ"):
        compared(*runs)
    # Images of a test folder have a hash of another kind.
    write_json(runs[1].split, {"sizes": {"val": 1}, "sha256": {"train": "aa", "test": "cc"}})
    assert str(runs[0].path) in compared(*runs)["unchecked"]


def test_where_a_hash_is_lost_it_is_said_that_the_images_could_not_be_checked(runs):
    assert compared(*runs)["unchecked"] == ""
    runs[1].split.write_text('{"sizes": {"va')
    said = compared(*runs)["unchecked"]
    assert said.startswith("Whether the test images are identical could not be checked")
    assert str(runs[1].path) in said
    assert str(runs[0].path) not in said


def test_without_a_hash_the_images_that_both_kept_tell_other_ones(runs):
    runs[1].split.unlink()
    arrays = dict(np.load(runs[1].gallery))
    np.savez(runs[1].gallery, **{**arrays, "images": arrays["images"] ^ 1})
    with pytest.raises(UserError, match="the images themselves differ"):
        compared(*runs)


def test_a_run_whose_predictions_are_lost_is_refused_with_the_command(runs):
    from cifar_lightning.report.report import write_confusion

    results = read_results(runs[1])
    write_confusion(runs[1], results.confusion, results.class_names)
    runs[1].predictions.unlink()
    with pytest.raises(UserError, match=r"cannot be read .*predictions.npz is missing.*\n.*cifar-lightning test"):
        compared(*runs)
