"""Images of one's own through the whole program: sizes and modes mixed, few and many classes, uneven numbers."""

import colorsys
import json

import numpy as np
import pytest
from PIL import Image
from program import REPO, start

from cifar_lightning.runs.folder import RunFolder

MODES = ("RGB", "L", "RGBA", "P", "CMYK", "1", "I;16")


def image(rng, number, num_classes, mode):
    """Return an image of a class: its colour or, in modes without one, its brightness, under noise."""
    height, width = rng.integers(18, 70, 2)
    hue = colorsys.hsv_to_rgb(number / num_classes, 0.9, 0.3 + 0.6 * number / num_classes)
    pixels = np.clip(255 * np.array(hue) + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return image.convert(mode)


def write_folders(root, num_classes, counts):
    """Write class folders; `counts` gives each class's images by its number."""
    rng = np.random.default_rng(0)
    for split, share in (("train", 1.0), ("test", 0.25)):
        for number in range(num_classes):
            folder = root / split / f"class {number:03}"
            folder.mkdir(parents=True)
            for k in range(max(1, round(share * counts(number)))):
                mode = MODES[k % len(MODES)]
                ending = "tif" if mode == "CMYK" else "png"
                image(rng, number, num_classes, mode).save(folder / f"{k}.{ending}")
    return root


@pytest.mark.slow(first=True)
@pytest.mark.parametrize(
    ("num_classes", "counts", "epochs", "least"),
    # The larger class has 40 % more than an even share, and the smaller as much less.
    [(3, lambda number: (70, 50, 30)[number], 8, 0.6), (200, lambda number: 14 if number % 2 else 6, 4, 0.015)],
    ids=["3 classes", "200 classes"],
)
def test_mixed_and_uneven_images_are_trained_on_tested_predicted_and_reported(
    tmp_path, num_classes, counts, epochs, least
):
    root = write_folders(tmp_path / "my_images", num_classes, counts)
    recipe = ["--config", REPO / "configs" / "own_images.yaml", "--data.root", root, "--epochs", epochs]
    small = ["--data.image_size", 32, "--model.name", "smallnet", "--model.model_kwargs", "{widths: [16, 32, 64]}"]
    trained = start("fit", *recipe, *small, "--lr", 0.005, "--run_dir", "run", cwd=tmp_path)
    assert "Uneven classes: " in trained.stdout
    run = RunFolder(tmp_path / "run")
    assert run.report.exists()
    metrics = json.loads(run.test_metrics.read_text())
    assert metrics["accuracy"] > least  # chance is 1 / num_classes
    supports = [row["support"] for row in metrics["per_class"].values()]
    assert supports == [max(1, round(0.25 * counts(number))) for number in range(num_classes)]
    start("test", run.path, cwd=tmp_path)
    assert json.loads(run.test_metrics.read_text())["accuracy"] == metrics["accuracy"]
    start("predict-images", run.path, root / "test", "--output", "predictions.csv", "--top_k", 1, cwd=tmp_path)
    rows = (tmp_path / "predictions.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert len(rows) == sum(1 for path in (root / "test").rglob("*.*"))
    start("analyze", run.path, cwd=tmp_path)


@pytest.mark.slow
def test_unreadable_images_are_left_out_on_request_and_again_in_a_resume(tmp_path):
    root = write_folders(tmp_path / "images", 2, lambda number: 20)
    for name in ("train/class 000/bad\n.png", "test/class 001/x.heic", "test/class 001/no suffix"):
        (root / name).write_text("no image")
    (root / "train" / "loose.png").write_text("in no class")
    flags = ["--data.dataset", "folder", "--data.root", root, "--data.image_size", 16, "--batch_size", 10]
    flags += ["--model.model_kwargs", "{widths: [4, 4, 8]}", "--epochs", 1, "--run_dir", "run"]
    refused = start("fit", *flags, cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) <= 3
    assert "1 of 41 images" in refused.stderr
    assert "2 of 12 images" in refused.stderr
    assert not (tmp_path / "run").exists()
    trained = start("fit", *flags, "--data.skip_unreadable", "true", cwd=tmp_path)
    assert "3 of 53 images are left out" in trained.stdout
    run = RunFolder(tmp_path / "run")
    listed = {row["path"]: row["reason"] for row in map(json.loads, run.skipped_files.read_text("ascii").splitlines())}
    assert sorted(listed) == [
        "test/class 001/no suffix",
        "test/class 001/x.heic",
        "train/class 000/bad\n.png",
        "train/loose.png",
    ]
    assert json.loads(run.split.read_text())["sizes"] == {"train": 36, "val": 4, "test": 10}
    resumed = start("fit", "--resume", run.path, "--epochs", 2, cwd=tmp_path)
    assert "3 of 53 images are left out" in resumed.stdout
    for path in run.path.rglob("*"):
        if path.is_file() and path != run.config:
            assert str(tmp_path).encode() not in path.read_bytes(), path
        if path.suffix == ".npz":
            with np.load(path) as arrays:  # text has 4 bytes a character
                assert [name for name in arrays if str(tmp_path) in str(arrays[name].tolist())] == [], path
    image(np.random.default_rng(1), 0, 2, "RGB").save(root / "train" / "class 000" / "bad\n.png")
    other = start("fit", "--resume", run.path, "--epochs", 3, cwd=tmp_path, check=False)
    assert other.returncode == 2
    assert "not the images" in other.stderr
