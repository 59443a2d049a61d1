import csv

import numpy as np
import pytest
from photos import photos
from PIL import Image
from program import TINY, fail, start

from cifar_lightning.formatting import printable


@pytest.fixture
def root(tmp_path):
    images, root = photos(12), tmp_path / "pho\x1btos"
    for at, image in enumerate(images):
        path = root / ("ant", "bee")[at % 2] / f"{at}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    Image.fromarray(images[4]).save(root / "bee" / "copy of 4.png")
    return root


def test_inspect_prints_a_screen_and_writes_a_page_and_needs_no_dataset_flag(root, tmp_path):
    done = start("inspect", "--data.root", root, "--output", "page.html", cwd=tmp_path)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) <= 30
    assert "copy of 4.png = ant/4.png" in done.stdout or "ant/4.png = bee/copy of 4.png" in done.stdout
    assert "\x1b" not in done.stdout
    assert printable(str(root)) in done.stdout
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "bee/copy of 4.png" in page
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output", "x.csv"], ("--output x.csv", ".html")),
        (["--output", "none/x.html"], ("--output none/x.html",)),
        (["--model.lr", "0.1"], ("--model.lr", "inspect")),
        (["--epochs", "3"], ("--trainer.max_epochs", "inspect")),
        (["--run_dir", "x"], ("--run_dir", "not of inspect")),
        (["--ckpt_path", "x.ckpt"], ("--ckpt_path", "inspect")),
        (["--data.dataset", "folder", "--data.root", "nowhere"], ("--data.root nowhere",)),
        (["--data.root", "typo"], ("--data.root typo",)),  # and CIFAR-10 is not downloaded to it
        (["--data.dataset", "cifa"], ("--data.dataset", "cifar10")),
        (["photos"], ("photos",)),
    ],
)
def test_what_inspect_refuses(monkeypatch, capsys, tmp_path, flags, words):
    printed = fail(monkeypatch, capsys, tmp_path, "inspect", *flags)
    assert all(word in printed for word in words), printed
    assert not list(tmp_path.glob("*.html"))


def test_the_page_may_be_named_in_a_config(monkeypatch, capsys, tmp_path):
    (tmp_path / "own.yaml").write_text("output: page.csv\ndata: {dataset: synthetic}\n")
    assert "--output page.csv: give an .html" in fail(monkeypatch, capsys, tmp_path, "inspect", "--config", "own.yaml")


@pytest.mark.parametrize("name", ["report.html", "comparison.html"])
def test_a_page_of_a_run_is_not_replaced(monkeypatch, capsys, tmp_path, name):
    for file in ("config.yaml", "split.json", name):
        (tmp_path / file).write_text("of a run")
    flags = ["--data.dataset", "synthetic", "--output", tmp_path / name]
    assert f"{name}: is a file of the run" in fail(monkeypatch, capsys, tmp_path, "inspect", *flags)
    assert (tmp_path / name).read_text() == "of a run"


@pytest.mark.slow
def test_what_is_planted_in_a_folder_is_named_by_fit_and_by_inspect(tmp_path):
    root, names, images = tmp_path / "photos", ("ant", "bee", "cow"), iter(photos(300, 16))

    def save(number, path):  # a class has the colour of one channel
        Image.fromarray(next(images) // np.roll([1, 3, 3], number).astype(np.uint8)).save(path)

    for split, num in (("train", 40), ("test", 25)):
        for number, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for at in range(num):
                save(number, root / split / name / f"{at}.png")
    mislabelled = [f"test/{names[(at + 1) % 3]}/mislabelled {at}.png" for at in range(5)]
    for at, path in enumerate(mislabelled):
        save(at % 3, root / path)
    copies = [f"test/{name}/copy.png" for name in names]
    for name, path in zip(names, copies, strict=True):
        Image.open(root / "train" / name / "7.png").save(root / path)
    small = ["--data.image_size", 16, "--batch_size", 30, "--epochs", 8, "--lr", 0.01, *TINY[-4:]]
    start("fit", "--data.dataset", "folder", "--data.root", root, *small, "--run_dir", "run", cwd=tmp_path)
    for file in ("label_issues.csv", "mistakes.csv"):
        listed = [row["path"] for row in csv.DictReader((tmp_path / "run" / file).read_text().splitlines())]
        assert set(mislabelled) <= set(listed[:10]), file
    printed = start("inspect", "--data.root", root, cwd=tmp_path).stdout
    page = (tmp_path / "inspect.html").read_text(encoding="utf-8")
    for path in copies:
        assert path in printed
        assert path in page
