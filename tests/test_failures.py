"""What errors of torch and of the system mean to a person."""

import torch

from cifar_lightning.failures import explain


def test_memory_that_ran_out_has_a_way_out():
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
    cpu = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    for error in (gpu, cpu):
        told = str(explain(error))
        assert "--batch_size" in told
        assert "--resume" in told
        assert len(told.splitlines()) <= 2


def test_a_dead_worker_is_named():
    told = str(explain(RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed.")))
    assert "pid 17" in told
    assert "--data.num_workers" in told


def test_a_full_disk_is_named_also_where_the_system_names_no_file():
    assert str(explain(OSError(28, "No space left on device"))).startswith(
        "a file of the run: cannot be written (No space"
    )
    assert str(explain(OSError(28, "No space left on device", "metrics.csv"))).startswith("metrics.csv: ")
    assert explain(OSError(2, "No such file or directory", "x")) is None


def test_what_is_not_known_stays_as_it_is():
    assert explain(RuntimeError("shape mismatch")) is None
