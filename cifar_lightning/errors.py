"""What users are told: the two exceptions that are reported in a few lines, and remarks, once for all processes."""

import os


class UserError(ValueError):
    """Raised for everything a user can mend; the command line prints it without a traceback and exits with 2.

    The message has one or two lines: the flag or path, the value got, the values allowed, what to do next.
    """


class RunError(RuntimeError):
    """Raised where a run that had begun cannot go on: a diverged loss, a full disk, too little memory.

    The command line prints it without a traceback and exits with 1. The message is as short as a `UserError`'s and says
    what is kept and how to go on.
    """


def is_first_process() -> bool:
    """Return whether this process is the first of all, whoever started them: Lightning, torchrun or SLURM."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def remark(text: str) -> None:
    """Print a line, in the first process alone."""
    if is_first_process():
        print(text, flush=True)
