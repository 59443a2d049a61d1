"""The real program on several processes that torchrun or SLURM starts: one run folder, every image counted once."""

import contextlib
import csv
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from program import REPO, TINY, popen, start

from cifar_lightning.runs.folder import RunFolder

NUM_TEST = 1000  # the synthetic set's; 3 does not divide it
TIMEOUT_S = 300
TORCHRUN = ["-m", "torch.distributed.run"]
DDP = ["--trainer.strategy", "ddp"]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_together(*commands, cwd, variables=None):
    """Run commands at the same time, each with further environment variables; return what each printed on stdout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    environment.pop("CIFAR_LIGHTNING_RUN_DIR", None)
    processes, files = [], []
    with contextlib.ExitStack() as stack:
        for command, further in zip(commands, variables or [{}] * len(commands), strict=True):
            words = [sys.executable, *map(str, command)]
            pipes = [stack.enter_context(tempfile.NamedTemporaryFile("w+", encoding="utf-8")) for _ in range(2)]
            processes.append(popen(words, cwd=cwd, env=environment | further, stdout=pipes[0], stderr=pipes[1]))
            stack.callback(end, processes[-1])
            files.append(pipes)
        statuses = [process.wait(timeout=TIMEOUT_S) for process in processes]
        printed = [[Path(file.name).read_text(encoding="utf-8") for file in pipes] for pipes in files]
    assert statuses == [0] * len(processes), printed
    return [stdout for stdout, _ in printed]


def end(process):
    """End what still runs: torchrun ends its processes, which SIGKILL would leave behind."""
    if process.poll() is None:
        process.terminate()
        process.wait(timeout=60)


def rows_of(run):
    return list(csv.DictReader(run.metrics_csv.read_text(encoding="utf-8").splitlines()))


def check_run(path, *, num_processes, batch_size, printed):
    """Everything that must hold of a run of one epoch, whoever started its processes."""
    run = RunFolder(path)
    steps = -(-900 // (batch_size * num_processes))
    rows = rows_of(run)
    assert [(row["epoch"], int(row["step"])) for row in rows] == [("0", steps)]
    writers = {events.name.split(".")[-2] for events in path.glob("events.out.tfevents.*")}
    assert len(writers) == 1, "the process that wrote a file is in its name"
    assert json.loads(run.environment.read_text(encoding="utf-8"))["num_devices"] == num_processes
    for predictions_path, num_images in ((run.predictions, NUM_TEST), (run.predictions_val, 100)):
        with np.load(predictions_path) as predictions:
            assert predictions["indices"].tolist() == list(range(num_images))
            assert len(np.unique(predictions["names"])) == num_images
    rows_by_name = run.predictions_csv.read_text(encoding="utf-8").splitlines()
    assert len(rows_by_name) == 1 + NUM_TEST + 100
    confusion = torch.load(run.confusion_matrix_pt, weights_only=True)
    assert confusion.sum(1).tolist() == [NUM_TEST // 10] * 10
    assert json.loads(run.test_metrics.read_text(encoding="utf-8"))["num_images"] == NUM_TEST
    assert "".join(printed).count("Test accuracy") == 1
    return rows


@pytest.mark.slow
def test_torchrun_makes_one_run_and_every_test_image_is_counted_once(tmp_path):
    launcher = [*TORCHRUN, "--standalone", "--nproc_per_node", 3, REPO / "train.py"]  # 3 does not divide 1,000
    flags = [*TINY, *DDP, "--trainer.devices", 3, "--batch_size", 50, "--epochs", 1, "--run_dir", "run"]
    printed = run_together([*launcher, "fit", *flags], cwd=tmp_path)
    check_run(tmp_path / "run", num_processes=3, batch_size=50, printed=printed)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_two_processes_at_batch_size_32_make_the_steps_of_one_at_64(tmp_path):
    several = [*DDP, "--trainer.devices", 2, "--batch_size", 32]
    for name, flags in (("two", several), ("one", ["--batch_size", 64])):
        done = start("fit", *TINY, *flags, "--epochs", 1, "--run_dir", name, cwd=tmp_path)
        rows = check_run(
            tmp_path / name, num_processes=2 if name == "two" else 1, batch_size=int(flags[-1]), printed=[done.stdout]
        )
        assert rows[0]["step"] == "15"


@pytest.mark.slow
def test_a_single_process_under_ddp_trains_on_where_the_stem_is_no_longer_trained(tmp_path):
    model = ["--model.name", "speednet", "--model.schedule", "linear", "--model.stem_train_fraction", 0.4]
    start("fit", *TINY, *model, *DDP, "--trainer.devices", 1, "--epochs", 1, "--run_dir", "run", cwd=tmp_path)
    assert rows_of(RunFolder(tmp_path / "run"))[0]["step"] == "9"


@pytest.mark.slow(first=True)
def test_two_machines_make_one_run_and_a_third_start_resumes_it(tmp_path):
    # Two agents on one machine: what differs between machines (the network between them) is torchrun's.
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_id", "run", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    launcher = [*TORCHRUN, "--nnodes", 2, "--nproc_per_node", 1, *rendezvous, REPO / "train.py"]
    two = [*DDP, "--trainer.num_nodes", 2, "--trainer.devices", 1]
    command = [*launcher, "fit", *TINY, *two, "--batch_size", 50, "--epochs", 1, "--run_dir", "run"]
    printed = run_together(command, command, cwd=tmp_path)
    check_run(tmp_path / "run", num_processes=2, batch_size=50, printed=printed)
    launcher[launcher.index(rendezvous[-1])] = f"127.0.0.1:{free_port()}"
    again = [*launcher, "fit", "--resume", "run", "--epochs", 2]
    printed = run_together(again, again, cwd=tmp_path)
    assert sum("Resuming" in text for text in printed) == 1
    rows = rows_of(RunFolder(tmp_path / "run"))
    assert [(row["epoch"], row["step"]) for row in rows] == [("0", "9"), ("1", "18")]


@pytest.mark.slow
def test_the_tasks_of_a_slurm_job_make_one_run(tmp_path):
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    job |= {"SLURM_NNODES": "2", "SLURM_NODELIST": "localhost", "SLURM_LOCALID": "0", "MASTER_PORT": str(free_port())}
    tasks = [job | {"SLURM_PROCID": str(task), "SLURM_NODEID": str(task)} for task in (0, 1)]
    two = [*DDP, "--trainer.num_nodes", 2, "--trainer.devices", 1]
    command = [REPO / "train.py", "fit", *TINY, *two, "--batch_size", 50, "--epochs", 1, "--run_dir", "run"]
    printed = run_together(command, command, cwd=tmp_path, variables=tasks)
    check_run(tmp_path / "run", num_processes=2, batch_size=50, printed=printed)


@pytest.mark.slow
def test_without_a_run_folder_for_all_torchrun_ends_and_the_reason_is_named(tmp_path):
    launcher = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", str(REPO / "train.py")]
    words = [sys.executable, *launcher, "fit", *map(str, [*TINY, *DDP, "--trainer.devices", 2, "--epochs", 1])]
    environment = {name: value for name, value in os.environ.items() if name != "CIFAR_LIGHTNING_RUN_DIR"}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1  # torchrun's own
    assert "need one --run_dir for all" in done.stderr
    assert not (tmp_path / "runs").exists()


STEMS = """
import lightning.pytorch as pl, torch
from cifar_lightning import ImageClassifier, ImageDataModule

class Watch(pl.Callback):
    biases = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.biases.append(pl_module.model.stem.bias.detach().clone())

quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = pl.Trainer(accelerator="cpu", strategy="ddp", devices=2, max_epochs=1, callbacks=[Watch()], **quiet)
widths = {"widths": [4, 8, 8]}
module = ImageClassifier("speednet", image_size=16, stem_train_fraction=0.6, lr=0.01, model_kwargs=widths)
trainer.fit(module, ImageDataModule("synthetic", image_size=16, batch_size=250))
if trainer.is_global_zero:
    print("moved", [not torch.equal(*pair) for pair in zip(Watch.biases, Watch.biases[1:])])
"""


@pytest.mark.slow
def test_one_cycle_on_two_processes_stops_the_stem_at_its_fraction_too(tmp_path):
    (tmp_path / "stems.py").write_text(f"import sys\nsys.path.insert(0, {str(REPO)!r})\n{STEMS}", encoding="utf-8")
    [printed] = run_together([tmp_path / "stems.py"], cwd=tmp_path)
    assert f"moved {[True] * 4 + [False] * 4}" in printed  # 9 steps, of which 5 train it
