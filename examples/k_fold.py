"""Cross-validation, each fold with a seed of its own: python examples/k_fold.py [FOLDS EPOCHS]."""

import statistics
import sys

import numpy as np
from own_dataset import Shapes
from torch.utils.data import Subset

import cifar_lightning

if __name__ == "__main__":
    num_folds, epochs = map(int, sys.argv[1:] or ["5", "4"])
    dataset = Shapes()
    order = np.random.default_rng(0).permutation(len(dataset))
    accuracies: list[float] = []
    for fold in range(num_folds):
        test = order[fold::num_folds]
        train = np.setdiff1d(order, test)
        run = cifar_lightning.fit(
            "smallnet",
            (Subset(dataset, train.tolist()), Subset(dataset, test.tolist())),
            {"data.seed": fold, "model.model_kwargs": {"widths": [8, 16, 32]}},
            epochs=epochs,
            lr=1e-2,
            batch_size=50,
            seed_everything=fold,
        )
        accuracies.append(run.metrics["accuracy"])
    print("accuracy of each fold", *accuracies, "standard deviation", statistics.pstdev(accuracies))
    print("test accuracy", statistics.mean(accuracies))
