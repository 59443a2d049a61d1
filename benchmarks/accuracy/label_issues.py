"""Label errors that are found where some labels are changed, next to cleanlab's on the same predictions.

python -m benchmarks.accuracy.label_issues --data ROOT --work DIR

ROOT holds CIFAR-10, or its images in class folders. DIR keeps the predictions for the next call, which trains nothing;
cleanlab (`pip install cleanlab`) may be in another environment then.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from cifar_lightning.metrics.classification import accuracy, confusion_matrix
from cifar_lightning.metrics.label_issues import find_label_issues, self_confidence

FRACTION = 0.05  # of the labels of training and validation that are changed, to another class at random
NUM_TRAIN, NUM_VAL, NUM_TEST = 10_000, 5_000, 1_000
WIDTHS, EPOCHS, LR = (16, 32, 64), 5, 5e-3  # a narrow SmallNet, which trains in minutes on a CPU
LISTED = (100, 250)


def change_labels(targets: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    """Return labels of which exactly `FRACTION` are another class, each as likely."""
    rng, changed = np.random.default_rng(seed), targets.copy()
    at = rng.choice(len(targets), round(FRACTION * len(targets)), replace=False)
    changed[at] = (targets[at] + rng.integers(1, num_classes, len(at))) % num_classes
    return changed


def open_cifar10(root: Path) -> tuple[int, Any, Any]:
    """Return the number of classes, and the training and test images of CIFAR-10 or of class folders."""
    from cifar_lightning.data.datasets import open_source
    from cifar_lightning.data.image_folder import holds_class_folders

    source = open_source("folder" if holds_class_folders(root) else "cifar10", str(root), None)
    source.prepare()
    return len(source.class_names), source.load("train"), source.load("test")


def predict_changed(root: Path, work: Path) -> None:
    """Train on changed labels; write validation `probs`, changed `labels` and `true` ones into `work`."""
    import cifar_lightning
    from benchmarks.hardware import hardware_name  # torch, which the other environment may not have

    num_classes, train, test = open_cifar10(root)
    order = np.random.default_rng(0).permutation(len(train.images))
    parts = [np.sort(order[:NUM_TRAIN]), np.sort(order[NUM_TRAIN : NUM_TRAIN + NUM_VAL])]
    labels = [change_labels(train.targets[part], num_classes, seed) for seed, part in enumerate(parts)]
    sets = [(np.array(train.images[part]), each) for part, each in zip(parts, labels, strict=True)]
    tested = np.random.default_rng(0).permutation(len(test.images))[:NUM_TEST]
    sets.append((np.array(test.images[tested]), test.targets[tested]))
    settings = {"model.model_kwargs": {"widths": list(WIDTHS)}}
    run = cifar_lightning.fit("smallnet", (*sets,), settings, epochs=EPOCHS, lr=LR, run_dir=work / "run")
    with np.load(run.path / "predictions_val.npz") as predictions:
        assert (predictions["targets"] == labels[1]).all()
        np.savez(work / "val.npz", probs=predictions["probs"], labels=labels[1], true=train.targets[parts[1]])
    environment = json.loads((run.path / "environment.json").read_text(encoding="utf-8"))
    print(f"{hardware_name(environment)}, commit {environment['commit']}")
    print(f"test accuracy, of {NUM_TEST:,} images with unchanged labels: {run.metrics['accuracy']:.1%}")


def print_figures(name: str, order: np.ndarray, is_changed: np.ndarray) -> None:
    """Print precision and recall of the first images that are listed, and of all."""
    for num in (*LISTED, len(order)):
        hits = int(is_changed[order[:num]].sum())
        listed = min(num, len(order))
        precision, recall = hits / max(listed, 1), hits / is_changed.sum()
        print(f"{name:<28} first {listed:>4}: precision {precision:6.1%}, recall {recall:6.1%}")


def main() -> None:
    """Print the figures of ours and of cleanlab."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not (arguments.work / "val.npz").exists():
        predict_changed(arguments.data, arguments.work)
    with np.load(arguments.work / "val.npz") as arrays:
        probs, labels, true = (arrays[name] for name in ("probs", "labels", "true"))
    is_changed, num_classes = labels != true, probs.shape[1]
    of_true = accuracy(confusion_matrix(true, probs.argmax(1), num_classes))
    print(f"{len(labels):,} validation images, {is_changed.sum()} labels changed, accuracy {of_true:.1%}")
    print_figures("ours", find_label_issues(probs, labels), is_changed)
    others = np.array(probs)
    others[np.arange(len(labels)), labels] = 0
    margins = self_confidence(probs, labels) - others.max(1)
    print_figures("lowest margin of all", np.argsort(margins), is_changed)
    try:
        from cleanlab.filter import find_label_issues as find_with_cleanlab
    except ImportError:
        print("cleanlab is not installed: pip install cleanlab")
        return
    for way, rank in (("prune_by_noise_rate", "self_confidence"), ("both", "self_confidence")):
        found = find_with_cleanlab(labels, probs, filter_by=way, return_indices_ranked_by=rank)
        print_figures(f"cleanlab {way}", found, is_changed)


if __name__ == "__main__":
    main()
