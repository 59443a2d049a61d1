"""The default precision of a run, by its device."""

import sys

import torch
from jsonargparse import Namespace


def default_precision(on_cuda: bool) -> tuple[str, str]:
    """Return the precision where none is given, and why."""
    if on_cuda:
        return "16-mixed", "the GPU is faster in half precision"
    return "32-true", "half precision is slower on most CPUs"


def is_on_cuda(trainer: Namespace) -> bool:
    """Whether a Trainer with these arguments runs on a CUDA device."""
    return torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")


def settle_precision(trainer: Namespace) -> None:
    """Set precision and cuDNN's benchmark mode of the Trainer's arguments by device where they are not given.

    A precision without hardware support is replaced by 32-true, with a line on stderr: on a CPU half precision is
    emulated then, 90 times slower.
    """
    on_cuda = is_on_cuda(trainer)
    if on_cuda:
        torch.set_float32_matmul_precision("high")  # TF32 for float32 matmuls
    if trainer.precision is None:
        trainer.precision, _ = default_precision(on_cuda)
    elif not on_cuda and (needed := needed_for(str(trainer.precision))):
        print(f"--trainer.precision {trainer.precision} needs {needed}: using 32-true.", file=sys.stderr)
        trainer.precision = "32-true"
    if trainer.benchmark is None:
        trainer.benchmark = not trainer.deterministic


def needed_for(precision: str) -> str:
    """Return what a precision needs and this machine's CPU lacks, in words; "" where the CPU does."""
    if precision in ("16", "16-mixed", "16-true"):
        return "a GPU"
    # torch's own tests for its kernels; torch 2.11 has no public names for them.
    if precision.startswith("bf16") and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return "a GPU, or a CPU with AVX512-BF16 or AMX"
    return ""
