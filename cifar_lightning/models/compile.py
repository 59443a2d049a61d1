"""torch.compile, or the reason why a model runs uncompiled."""

import sys

import torch
from torch import nn


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Compile a network in place, or say on stderr that it runs uncompiled, and why."""
    from torch._inductor import cpp_builder  # takes seconds to import
    from torch.utils._triton import has_triton

    try:
        if device.type == "cpu":
            cpp_builder.get_cpp_compiler()  # without this, the first step would fail
        elif not has_triton():
            raise RuntimeError("Triton is not there for this GPU")
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        print(f"--model.compile: the network runs uncompiled ({reason}).", file=sys.stderr)
        return
    model.compile()
