"""What errors of torch and of the system mean to the person whose run they ended."""

import errno

import torch

from cifar_lightning.errors import RunError

_GOES_ON = "Checkpoints are kept: python train.py fit --resume RUN goes on."


_FULL = (errno.ENOSPC, errno.EDQUOT)


def explain(error: RuntimeError | OSError) -> RunError | None:
    """Return the error in a person's words, with a way out; None for one that is not known, such as a mistake here."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        where = error.filename or "a file of the run"
        full = f"{where}: cannot be written ({error.strerror}).\nMake room. {_GOES_ON}"
        return RunError(full) if error.errno in _FULL else None
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return RunError(
            "out of memory: halve --batch_size and give --trainer.accumulate_grad_batches 2, which trains alike; "
            f"--data.eval_batch_size for validation and test.\n{_GOES_ON}"
        )
    if "DataLoader worker" in text:
        return RunError(
            f"a loader's worker process died ({text[:120]}).\n"
            f"Memory may have run out: fewer --data.num_workers. {_GOES_ON}"
        )
    return None
