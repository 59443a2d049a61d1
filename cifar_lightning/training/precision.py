"""How many bits a run computes with: what its device is good at."""

import sys

import torch
from jsonargparse import Namespace


def settle_precision(trainer: Namespace) -> None:
    """Choose by device what was left open: precision, and cuDNN's autotune where runs need not be deterministic.

    A precision that the device has no instructions for is replaced, and a line on stderr says so: on a CPU without them
    half precision is emulated and 90 times slower.

    Args:
        trainer: The Trainer's arguments; `precision` and `benchmark` are set.
    """
    on_cuda = torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")
    if on_cuda:
        torch.set_float32_matmul_precision("high")  # TF32 where a product is in 32 bits
    if trainer.precision is None:
        trainer.precision = "16-mixed" if on_cuda else "32-true"
    elif not on_cuda and (needed := _needed_for(str(trainer.precision))):
        print(f"--trainer.precision {trainer.precision} needs {needed}: using 32-true.", file=sys.stderr)
        trainer.precision = "32-true"
    if trainer.benchmark is None:
        trainer.benchmark = not trainer.deterministic


def _needed_for(precision: str) -> str:
    """Return what this CPU lacks for a precision; empty where it lacks nothing."""
    if precision in ("16", "16-mixed", "16-true"):
        return "a GPU"
    # What torch itself asks where a kernel depends on it; there is no public name for it in torch 2.11.
    if precision.startswith("bf16") and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return "a GPU, or a CPU with AVX512-BF16 or AMX"
    return ""
