"""Run folders as `fit` writes them, made without training."""

import numpy as np
import yaml

from cifar_lightning.files import write_json, write_text_durably
from cifar_lightning.report.gallery import gallery_positions
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.runs.metrics_table import MetricsTable
from cifar_lightning.training.predictions import _write_npz

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def made_predictions(num_classes, n, seed=0, skill=2.5, sharpness=0.6):
    """Return logits (n, classes) that often confuse neighbouring classes, and balanced targets (n,).

    A `sharpness` below 1 makes the model underconfident, as label smoothing does.
    """
    rng = np.random.default_rng(seed)
    targets = np.arange(n) % num_classes
    logits = rng.normal(size=(n, num_classes))
    logits[np.arange(n), targets] += skill
    logits[np.arange(n), targets ^ 1 if num_classes % 2 == 0 else (targets + 1) % num_classes] += skill / 3
    return (sharpness * logits).astype(np.float32), targets.astype(np.int64)


def make_run(path, names=CIFAR10, n=2000, seed=0, image_size=32, epochs=5, **kwargs):
    """Write a run folder; return it."""
    run = RunFolder(path)
    run.checkpoints.mkdir(parents=True)
    names = tuple(names)
    logits, targets = made_predictions(len(names), n, seed, **kwargs)
    val_logits, val_targets = made_predictions(len(names), n // 2, seed + 1000, **kwargs)
    written = {
        "test": (run.predictions, (logits, targets)),
        "val": (run.predictions_val, (val_logits, val_targets)),
    }
    for split, (file, arrays) in written.items():
        indices = np.arange(len(arrays[1]))
        files = [f"{split}/{names[label]}/{index:05}.png" for index, label in enumerate(arrays[1])]
        known = {"indices": indices, "names": np.array(files), "class_names": np.array(names)}
        _write_npz(file, logits=arrays[0], targets=arrays[1], **known)
    shown = gallery_positions(logits, targets)
    # An image is the same in every run that keeps it.
    images = np.stack(
        [np.random.default_rng(i).integers(0, 256, (image_size, image_size, 3), dtype=np.uint8) for i in shown]
    )
    _write_npz(run.gallery, images=images, indices=shown, class_names=np.array(names))
    split = {"dataset": "cifar10: made", "sizes": {"train": 9, "val": n // 2, "test": n}, "seed": 0}
    write_json(run.split, {**split, "sha256": {"train": "c0de", "test": f"made-{n}"}})
    write_json(run.environment, {"commit": "c0ffee", "dirty": False, "command": ["python", "train.py", "fit"]})
    config = {"seed_everything": 0, "model": {"name": "smallnet", "lr": 0.003}, "data": {"dataset": "cifar10"}}
    write_text_durably(run.config, yaml.safe_dump(config))
    one_cycle = [
        0.1 * min((step + 1) / (3 * epochs), (10 * epochs - step) / (7 * epochs)) for step in range(10 * epochs)
    ]
    write_json(run.learning_rates, {"step": list(range(10 * epochs)), "lr": one_cycle})
    metrics, timing = MetricsTable(run.metrics_csv), MetricsTable(run.timing_csv)
    for epoch in range(epochs):
        done = epoch / epochs
        row = {
            "epoch": epoch,
            "step": 10 * (epoch + 1),
            "train/loss": 2 - done,
            "train/acc": done,
            "lr": 0.1 * (1 - done),
        }
        metrics.append({**row, "val/loss": 2 - done, "val/acc": 0.9 * done, "val/f1": done, "val/ece": 0.1})
        timing.append({"epoch": epoch, "elapsed_s": 10.5, "train_images_per_s": 1000.0, "peak_memory_mb": 500.0})
    return run
