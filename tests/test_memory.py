"""Free memory is less than all memory, and notices what is taken; freed memory may be kept."""

import platform
import subprocess
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to")
def test_memory_that_is_kept_is_used_again_without_the_system():
    program = """
import resource
import numpy as np
from cifar_lightning.memory import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.ones(100_000_000, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = new_pages()
keep_freed_memory()
np.ones(100_000_000, np.uint8)
print(given_back, new_pages())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    given_back, kept = (int(number) for number in done.stdout.split())
    assert given_back > 100
    assert kept < given_back / 20
