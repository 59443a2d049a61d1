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


@pytest.mark.slow
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
