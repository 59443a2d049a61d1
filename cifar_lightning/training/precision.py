"""The default precision of a run, by its device."""

import functools
import platform
import sys
import time

import torch
from jsonargparse import Namespace
from torch.nn import functional as F

from cifar_lightning.errors import UserError
from cifar_lightning.runs.processes import is_started_from_outside

# bfloat16 is the default from here on: a step is not convolutions alone; and with MKL those of float32 have fewer
# multiplications than the ones that are timed (models/winograd.py).
_WORTHWHILE = 1.5 if torch.backends.mkl.is_available() else 1.25


def default_precision(on_cuda: bool, on_mps: bool = False, in_several_processes: bool = False) -> tuple[str, str]:
    """Return the precision where none is given, and why."""
    if on_cuda:
        return "16-mixed", "the GPU is faster in half precision"
    if on_mps:
        return "32-true", "half precision is not tested on Apple's GPU"
    if needed_for("bf16-mixed"):
        return "32-true", "this CPU has no instructions for half precision"
    if in_several_processes:
        return "32-true", "processes of one run that each time bfloat16 may choose differently"
    gain = bfloat16_gain()
    why = f"convolutions in bfloat16 are {gain:.2f} times as fast as in float32 here"
    return "bf16-mixed" if gain >= _WORTHWHILE else "32-true", why


@functools.cache
def bfloat16_gain() -> float:
    """Return how many times as fast as in float32 this CPU convolves in bfloat16, timed for about 0.1 s.

    Instructions alone do not tell: with AVX512-BF16 convolutions are twice as fast on an AMD EPYC, and 0.53 times as
    fast on an Intel Xeon whose AMX is switched off (benchmarks/LOG.md).
    """
    images, weight = torch.ones(32, 64, 24, 24), torch.ones(64, 64, 3, 3)
    operands = {
        dtype: [tensor.to(dtype, memory_format=torch.channels_last) for tensor in (images, weight)]
        for dtype in (torch.float32, torch.bfloat16)
    }
    best = dict.fromkeys(operands, float("inf"))
    with torch.inference_mode():
        for _ in range(5):  # in turn, and the best of each: other programs delay both
            for dtype, (x, filters) in operands.items():
                begun = time.perf_counter()
                F.conv2d(x, filters, padding=1)
                best[dtype] = min(best[dtype], time.perf_counter() - begun)
    return best[torch.float32] / best[torch.bfloat16]


def is_on_cuda(trainer: Namespace) -> bool:
    """Whether a Trainer with these arguments runs on a CUDA device."""
    return torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")


def is_on_mps(trainer: Namespace) -> bool:
    """Whether a Trainer with these arguments runs on Apple's GPU."""
    from lightning.pytorch.accelerators import MPSAccelerator  # not at the top: `doctor` does without Lightning

    return trainer.accelerator in ("auto", "gpu", "mps") and MPSAccelerator.is_available() and not is_on_cuda(trainer)


def settle_precision(trainer: Namespace) -> None:
    """Set precision and cuDNN's benchmark mode of the Trainer's arguments by device where they are not given.

    A precision without hardware support is replaced by 32-true, with a line on stderr: on a CPU half precision is
    emulated then, 90 times slower. One that a CPU supports but is slower in is kept, with a line. A GPU without
    bfloat16 (before Ampere) gets 16-mixed for bf16-mixed.

    Raises:
        UserError: 64-true on Apple's GPU, which has no float64.
    """
    on_cuda, on_mps = is_on_cuda(trainer), is_on_mps(trainer)
    asked = str(trainer.precision)
    if on_cuda:
        torch.set_float32_matmul_precision("high")  # TF32 for float32 matmuls
    if trainer.precision is None:
        in_several = str(trainer.devices) not in ("auto", "1") or trainer.num_nodes > 1 or is_started_from_outside()
        trainer.precision, _ = default_precision(on_cuda, on_mps, in_several)
    elif on_mps and asked in ("64", "64-true"):
        raise UserError(f"--trainer.precision {asked}: Apple's GPU has no float64; give --trainer.accelerator cpu.")
    elif on_mps and asked.startswith(("16", "bf16")):
        print(f"--trainer.precision {asked}: not tested on Apple's GPU: using 32-true.", file=sys.stderr)
        trainer.precision = "32-true"
    elif not on_cuda and (needed := needed_for(asked)):
        print(f"--trainer.precision {asked} needs {needed}: using 32-true.", file=sys.stderr)
        trainer.precision = "32-true"
    elif on_cuda and asked.startswith("bf16") and not torch.cuda.is_bf16_supported(including_emulation=False):
        trainer.precision = "32-true" if asked == "bf16-true" else "16-mixed"
        print(f"--trainer.precision {asked} needs a GPU with bfloat16: using {trainer.precision}.", file=sys.stderr)
    elif not on_cuda and asked.startswith("bf16") and (gain := bfloat16_gain()) < 1:
        print(
            f"--trainer.precision {asked}: convolutions in bfloat16 are {gain:.2f} times as fast as in "
            "float32 here; 32-true is faster.",
            file=sys.stderr,
        )
    if trainer.benchmark is None:
        trainer.benchmark = not trainer.deterministic


def needed_for(precision: str) -> str:
    """Return what a precision needs and this machine's CPU lacks, in words; "" where the CPU does."""
    if precision in ("16", "16-mixed", "16-true"):
        return "a GPU"
    if precision.startswith("bf16") and not _has_bfloat16():
        return "a GPU, or a CPU with instructions for bfloat16 (AVX512-BF16, AMX, Arm's BF16)"
    return ""


def _has_bfloat16() -> bool:
    # torch's own tests for its kernels; torch 2.14 has no public names for them.
    if platform.machine() in ("aarch64", "arm64"):
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
