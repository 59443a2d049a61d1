"""What errors of torch and of the system mean to a person."""

import pytest
import torch
from program import REPO, TINY, start

from cifar_lightning.errors import RunError, UserError
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.error_messages import explain, explained, of_settings

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
WINDOWS = RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")
APPLE = RuntimeError("MPS backend out of memory (MPS allocated: 18.0 GiB, other allocations: 9 KiB).")
APPLE_TENSOR = RuntimeError("Invalid buffer size: 19.45 GB")
DRIVER = torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in ...")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
BROKEN = torch.AcceleratorError("CUDA error: unspecified launch failure\nSearch for `cudaErrorLaunchFailure' in ...")
FULL = OSError(28, "No space left on device", "metrics.csv")
WORKER = RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed.")
ALL = [GPU, CPU, WINDOWS, APPLE, APPLE_TENSOR, DRIVER, CUBLAS, BROKEN, FULL, WORKER]


@pytest.fixture
def run(tmp_path):
    """A run in a folder whose name a shell would take apart."""
    run = RunFolder(tmp_path / "my run")
    run.checkpoints.mkdir(parents=True)
    return run


@pytest.mark.parametrize("error", ALL, ids=lambda error: type(error).__name__)
def test_a_run_with_a_checkpoint_is_resumed_by_a_command_that_can_be_pasted(run, error):
    run.last_checkpoint.touch()
    message = str(explain(error, "fit", run))
    assert f"Checkpoints are kept: cifar-lightning fit --resume '{run.path}' resumes" in message
    assert len(message.splitlines()) <= 2


@pytest.mark.parametrize("error", ALL, ids=lambda error: type(error).__name__)
def test_without_a_checkpoint_none_is_promised(run, error):
    for message in (str(explain(error, "fit", run)), str(explain(error, "test"))):
        assert "--resume" not in message
        assert "kept" not in message
        assert message.endswith("start again.")


def test_memory_that_ran_out_has_a_way_out_that_the_command_takes(run):
    for error in (GPU, CPU, WINDOWS, APPLE, APPLE_TENSOR, DRIVER, CUBLAS):
        assert "--batch_size" in str(explain(error, "fit"))
        assert "--batch_size" in str(explain(error, "tune"))
        for command in ("validate", "test", "predict"):
            message = str(explain(error, command))
            assert "--data.eval_batch_size" in message
            assert "--batch_size" not in message
    run.last_checkpoint.touch()
    assert "another --batch_size only from" in str(explain(GPU, "fit", run))


def test_a_gpu_that_fails_is_named_and_an_assert_of_its_code_stays_a_traceback():
    message = str(explain(BROKEN, "fit"))
    assert "the GPU failed (CUDA error: unspecified launch failure)" in message
    assert "--trainer.accelerator cpu" in message
    assert explain(torch.AcceleratorError("CUDA error: device-side assert triggered\nSearch for ..."), "fit") is None
    with pytest.raises(RunError) as raised, explained("fit"):
        raise BROKEN
    assert raised.value.__cause__ is BROKEN


def test_a_dead_worker_is_named():
    message = str(explain(WORKER, "fit"))
    assert "pid 17" in message
    assert "--data.num_workers" in message


def test_a_full_disk_is_named_also_where_the_system_names_no_file(run):
    nameless = OSError(28, "No space left on device")
    assert str(explain(nameless, "fit", run)).startswith("a file of the run: cannot be written (No space")
    assert str(explain(nameless, "fit")).startswith("a file: cannot be written (No space")
    assert str(explain(FULL, "fit", run)).startswith("metrics.csv: ")


def test_a_file_that_fails_is_the_users_before_the_run_and_the_runs_in_it(run):
    error = OSError(30, "Read-only file system", "metrics.csv")
    assert explain(error, "fit") is None
    assert str(explain(error, "fit", run)).startswith("metrics.csv: Read-only file system.\n")
    assert explain(OSError(32, "Broken pipe"), "fit", run) is None


def test_unknown_errors_stay_as_they_are_and_known_ones_are_explained_once(run):
    assert explain(RuntimeError("shape mismatch"), "fit", run) is None
    run.last_checkpoint.touch()
    with pytest.raises(RunError, match="my run"), explained("fit"), explained("fit", run):
        raise WORKER


def test_only_what_comes_of_a_setting_is_blamed_on_one():
    for kind in (ValueError, TypeError, ImportError):
        with pytest.raises(UserError, match=r"^--trainer: no such strategy and more$"), of_settings():
            raise kind("no such strategy\nand more")
    for error in (KeyError("logger"), AttributeError("logger"), UserError("--model.lr: no")):
        with pytest.raises(type(error)) as raised, of_settings():
            raise error
        assert raised.value is error


READ_ONLY = """
from cifar_lightning.training import run_recorder
from cifar_lightning.cli.main import main


def refuse(table, row):
    raise OSError(30, "Read-only file system", str(table.path))


run_recorder.MetricsTable.append = refuse
main()
"""


def test_a_file_of_the_run_that_fails_in_training_is_a_run_that_failed(tmp_path):
    (tmp_path / "read_only.py").write_text(READ_ONLY)
    settings = {"program": tmp_path / "read_only.py", "PYTHONPATH": str(REPO), "check": False}
    done = start("fit", *TINY, "--epochs", 1, "--run_dir", "my run", cwd=tmp_path, **settings)
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first == "error: my run/metrics.csv: Read-only file system."
    assert second == "No checkpoint was written yet: start again."


def test_a_model_that_calls_view_is_told_the_flag_for_it():
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last).view(2, -1)
    assert "--model.memory_format contiguous" in str(explain(raised.value, "fit"))
