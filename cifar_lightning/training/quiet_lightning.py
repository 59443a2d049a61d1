"""Silences messages of Lightning that a user of the command line cannot act on, each with the reason."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

_ASKED_FOR = ("callbacks", "profilers")  # they log what verbose=True or a profiler asks for
_SILENCED = (
    # The advice would be wrong: torchmetrics has summed over the ranks, and the mean of uneven ranks is not the mean.
    ".*It is recommended to use .*sync_dist=True.*",
    # Our logger steps once an epoch whatever log_every_n_steps is.
    ".*is smaller than the logging interval.*",
    # Lightning 2.6 asks torch's pytree in a way that torch has deprecated.
    ".*LeafSpec.*is deprecated.*",
    # `test` needs no callback of `fit`; a run resumed in another folder starts with a best checkpoint of its own.
    "Be aware that when using `ckpt_path`.*",
    "The dirpath has changed from .*",
    # --trainer.max_steps ended the run before its first validation: there is no best, and the last weights are tested.
    ".*ModelCheckpoint.* could not find the monitored key.*",
    # Of torch: the current device is right, as Lightning has set it to that of the process.
    r"barrier\(\): using the device under current context.*",
    # In mixed precision the weights are in float32, which ModelSummary then assumes: what it shows is right.
    "Precision .*-mixed is not supported by the model summary.*",
    # A chosen --run_dir that a run without any checkpoint left behind.
    "Checkpoint directory .* exists and is not empty.*",
)


def _is_heard(record: logging.LogRecord) -> bool:
    """Whether Lightning's shared logger shows a record: of information, only what a verbose ModelCheckpoint says."""
    return record.levelno > logging.INFO or Path(record.pathname).name == "model_checkpoint.py"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence tips, the list of absent accelerators, the line about the seed, and the warnings above, until the end."""
    levels = {f"lightning.{library}": logging.WARNING for library in ("pytorch", "fabric")}
    levels |= {f"lightning.pytorch.{asked_for}": logging.INFO for asked_for in _ASKED_FOR}
    shared = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    levels[shared.name] = logging.INFO
    before = {name: logging.getLogger(name).level for name in levels}
    with warnings.catch_warnings():
        for message in _SILENCED:
            warnings.filterwarnings("ignore", message)
        try:
            shared.addFilter(_is_heard)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            yield
        finally:
            shared.removeFilter(_is_heard)
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)
