"""Random states as a checkpoint holds them."""

import random

import numpy as np
import torch
from fitting import seed

from cifar_lightning.checkpoints.rng_state import restore_rng, rng_state

CPU = torch.device("cpu")


def test_random_states_come_back_for_all_generators():
    seed(3)
    np.random.standard_normal()  # leaves a second value cached
    state = rng_state(CPU)

    def draw():
        return random.random(), np.random.standard_normal(), np.random.rand(), torch.rand(2).tolist()

    drawn = draw()
    draw()
    restore_rng(state, CPU)
    assert draw() == drawn


def test_apples_gpu_has_a_state_of_its_own_that_older_checkpoints_lack(monkeypatch):
    mps, restored = torch.device("mps"), []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr(torch.mps, "set_rng_state", restored.append)
    state = rng_state(mps)
    restore_rng(state, mps)
    assert restored == [torch.tensor([7])]
    restore_rng(state, CPU)
    restore_rng(rng_state(CPU), mps)
    del state["mps"]
    restore_rng(state, mps)
    assert len(restored) == 1


def test_random_states_are_plain_enough_for_a_checkpoint(tmp_path):
    torch.save(rng_state(CPU), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["python"] == random.getstate()
