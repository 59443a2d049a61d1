"""Free memory is less than all memory, and notices what is taken."""

import sys

import numpy as np
import pytest

from cifar_lightning.memory import free_host_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_taking_memory_leaves_less_of_it():
    before = free_host_bytes()
    assert 1e8 < before < 1e14
    taken = np.ones(400_000_000, np.uint8)
    assert free_host_bytes() < before - 1e8
    assert taken[0] == 1
