"""Silences messages of Lightning that a user of the command line cannot act on, each with the reason."""

import logging
import warnings
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
    # A chosen --run_dir that a run without any checkpoint left behind.
    "Checkpoint directory .* exists and is not empty.*",
)


def _is_heard(record: logging.LogRecord) -> bool:
    """Whether Lightning's shared logger shows a record: of information, only what a verbose ModelCheckpoint says."""
    return record.levelno > logging.INFO or Path(record.pathname).name == "model_checkpoint.py"


def silence() -> None:
    """Silence tips, the list of absent accelerators, the line about the seed, and the warnings above."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for asked_for in _ASKED_FOR:
        logging.getLogger(f"lightning.pytorch.{asked_for}").setLevel(logging.INFO)
    shared = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    shared.setLevel(logging.INFO)
    shared.addFilter(_is_heard)
    for message in _SILENCED:
        warnings.filterwarnings("ignore", message)
