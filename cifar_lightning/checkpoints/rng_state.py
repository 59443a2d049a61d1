"""What a checkpoint needs beside Lightning's state so that a run goes on bit for bit, for each rank.

Lightning keeps weights, optimiser, schedule, loops, callbacks and the loader's position, but no random state and none
of the sums of an epoch that has not ended. Order and augmentation are functions of seed and epoch and need nothing.
"""

import random
from typing import Any

import numpy as np
import torch

from cifar_lightning.checkpoints.loading import progress_of


def is_inside_epoch(checkpoint: dict[str, Any]) -> bool:
    """Return whether a checkpoint was saved before the end of an epoch that had begun."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    return bool(progress["ready"] > progress_of(checkpoint)[0])


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of Python's, NumPy's, torch's and the device's generators as plain types and tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `rng_state` returned; the device's only where it is of the same kind."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
