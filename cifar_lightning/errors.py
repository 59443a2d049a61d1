"""Exceptions that the command line prints without a traceback, remarks of the first process, silenced libraries."""

import contextlib
import logging
import os
from collections.abc import Iterator


class UserError(ValueError):
    """An error that the user can fix; the command line prints it without a traceback and exits with 2.

    The message has one or two lines: the flag or path, the value got, the values allowed, what to do next.
    """


class RunError(RuntimeError):
    """An error that ends a run after it began: a diverged loss, a full disk, too little memory.

    The command line prints it without a traceback and exits with 1. The message is as short as a `UserError`'s and says
    what is kept and how to resume.
    """


def is_first_process() -> bool:
    """Return whether this process is the first of all, whoever started them: Lightning, torchrun or SLURM."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def remark(text: str) -> None:
    """Print a line, in the first process only."""
    if is_first_process():
        print(text, flush=True)


@contextlib.contextmanager
def silenced(*loggers: str) -> Iterator[None]:
    """Let libraries log errors only."""
    levels = {logger: logger.level for logger in map(logging.getLogger, loggers)}
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
