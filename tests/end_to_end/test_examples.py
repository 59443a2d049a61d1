"""The examples are short and train models that have learned."""

import ast
import os

import pytest
from PIL import Image
from program import REPO, start

EXAMPLES = REPO / "examples"
TAKE_OTHER_IMAGES = ["plain_pytorch", "other_lightning_module", "own_transform", "timm_model"]
NAMES = [*TAKE_OTHER_IMAGES, "own_dataset", "report_from_plain_trainer", "focal_loss", "k_fold"]
NAMES += ["frozen_backbone"]


def accuracy_of(name, *arguments, cwd):
    done = start(*arguments, cwd=cwd, program=EXAMPLES / f"{name}.py", PYTHONPATH=str(REPO))
    assert list(cwd.glob("*")) == [cwd / "images"] * ("folder" in arguments), "an example leaves nothing behind"
    return float(done.stdout.splitlines()[-1].removeprefix("test accuracy "))


def test_every_example_is_tested_and_shorter_than_40_lines():
    texts = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert sorted(texts) == sorted(NAMES)
    assert [name for name, text in texts.items() if len(text.splitlines()) >= 40] == []
    assert all(f"python examples/{name}.py" in ast.get_docstring(ast.parse(text)) for name, text in texts.items())


@pytest.mark.parametrize("name", ["plain_pytorch", "other_lightning_module", "own_dataset"])
def test_an_example_trains_a_model_that_has_learned(name, tmp_path):
    assert 0.5 < accuracy_of(name, cwd=tmp_path) <= 1, "ten classes: chance is 0.1"


@pytest.mark.slow
def test_the_focal_loss_trains_a_model_that_has_learned(tmp_path):
    assert 0.5 < accuracy_of("focal_loss", cwd=tmp_path) <= 1


@pytest.mark.slow
def test_a_timm_model_learns_with_image_classifier(tmp_path):
    pytest.importorskip("timm")
    assert 0.3 < accuracy_of("timm_model", "--epochs", 1, cwd=tmp_path) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", TAKE_OTHER_IMAGES)
def test_an_example_takes_other_images(name, tmp_path):
    if name == "timm_model":
        pytest.importorskip("timm")
    for split in ("train", "test"):
        for class_name, colour in (("dark", 40), ("light", 200)):
            folder = tmp_path / "images" / split / class_name
            folder.mkdir(parents=True)
            for k in range(50):
                Image.new("RGB", (32, 32), (colour + k % 20,) * 3).save(folder / f"{k}.png")
    flags = ["--dataset", "folder", "--root", "images", "--epochs", 20]
    assert accuracy_of(name, *flags, cwd=tmp_path) > 0.9


def test_without_timm_the_example_says_how_to_install_it(tmp_path):
    (tmp_path / "timm.py").write_text("raise ImportError\n")
    path = f"{tmp_path}{os.pathsep}{REPO}"
    done = start(cwd=tmp_path, program=EXAMPLES / "timm_model.py", check=False, PYTHONPATH=path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "pip install -e '.[timm]'" in done.stderr


@pytest.mark.slow
def test_a_module_in_a_plain_trainer_gets_a_report(tmp_path):
    program = EXAMPLES / "report_from_plain_trainer.py"
    start(1, cwd=tmp_path, program=program, PYTHONPATH=str(REPO))
    done = start(cwd=tmp_path, program=program, PYTHONPATH=str(REPO))
    assert 0.5 < float(done.stdout.splitlines()[-1].removeprefix("test accuracy ")) <= 1
    run = tmp_path / "runs" / "OtherModule" / "2"
    assert "train/loss" in (run / "metrics.csv").read_text()
    assert "OtherModule" in (run / "report.html").read_text(encoding="utf-8")
    assert list(tmp_path.glob("lightning_logs/version_1/events.out.tfevents.*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "chance", "times", "runs"),
    [("k_fold", (2, 2), 1 / 3, 2, ["1", "2", "3", "4"]), ("frozen_backbone", (), 0.1, 1, ["1"])],
)
def test_an_example_that_makes_runs_leaves_them_each_time(name, arguments, chance, times, runs, tmp_path):
    for _ in range(times):
        done = start(*arguments, cwd=tmp_path, program=EXAMPLES / f"{name}.py", PYTHONPATH=str(REPO))
    lines = done.stdout.splitlines()
    assert 1.3 * chance < float(lines[-1].removeprefix("test accuracy ")) <= 1
    assert done.stderr == ""
    assert [path.parent.name for path in sorted(tmp_path.rglob("report.html"))] == runs
    assert name == "k_fold" or "trained fc.weight fc.bias" in lines
