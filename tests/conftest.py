"""Shapes are checked while the tests run; every test has few threads and starts from the same seed."""

import gc
import os

# Before torch is imported, also by the programs that tests start: tests run side by side, and more threads than cores
# make all of them wait.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from jaxtyping import install_import_hook

# For what stays on the disk when the power is cut, which no test does; the disk takes 0.2 s of each short training.
os.fsync = lambda file: None

# In a hook of git these lead each git that a test starts to the repository of the hook.
for variable in [name for name in os.environ if name.startswith("GIT_")]:
    del os.environ[variable]

# Before the first import of these modules: their jaxtyping annotations are checked at every call.
CHECKED = ("transforms.augmentation", "transforms.operations", "transforms.policies", "transforms.mixup")
CHECKED += ("transforms.pipeline", "transforms.photographs")
CHECKED += ("models", "optim.optimizers", "optim.muon", "data.loaders", "data.splits")
CHECKED += ("metrics.classification", "metrics.calibration", "report.figures", "report.gallery", "report.results")
CHECKED += ("report.insights", "report.findings", "report.comparison", "inference", "checkpoints.loading")
CHECKED += ("checkpoints.pretrained", "training.module", "training.tta", "training.train_metrics")
install_import_hook([f"cifar_lightning.{name}" for name in CHECKED], "beartype.beartype")


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def parser():
    """The parser of fit's flags, which takes a second to make."""
    from cifar_lightning.cli.lightning_cli import fit_parser

    return fit_parser()


@pytest.fixture
def decoding_here(request, monkeypatch):
    """Images are decoded without worker processes, except in tests marked `real_workers`."""
    from program import decode_here

    if request.node.get_closest_marker("real_workers") is None:
        decode_here(monkeypatch)


def pytest_collection_modifyitems(items):
    """Start the longest tests first, so that none of them runs alone at the end."""
    items.sort(key=lambda item: not any(mark.kwargs.get("first") for mark in item.iter_markers("slow")))


def pytest_collection_finish():
    # The libraries stay: without this each full collection visits their millions of objects. Hypothesis, whose plugins
    # look for objects when it is first imported, is imported before.
    import hypothesis  # noqa: F401 - for its plugins

    gc.collect()
    gc.freeze()
