"""States of the random number generators of a process, for a checkpoint.

Lightning saves weights, optimizer, schedule, loops, callbacks and the position of the loader, but no RNG state. Order
and augmentation are functions of seed and epoch and need none; dropout and MixUp do.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the RNG states of Python, NumPy, torch and the device as plain types and tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "mps": torch.mps.get_rng_state() if device.type == "mps" else None,
    }


@contextmanager
def rng_state_kept(device: torch.device) -> Iterator[None]:
    """Leave the RNG states as they were before."""
    state = rng_state(device)
    try:
        yield
    finally:
        restore_rng(state, device)


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Restore the states of `rng_state`; a GPU's only on a device of the same kind."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    if state.get("mps") is not None and device.type == "mps":  # earlier versions did not save it
        torch.mps.set_rng_state(state["mps"])
