"""torch.compile, with a message where it cannot run."""

import sys

import torch
from torch import nn


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Compile a model in place; without a working compiler, leave it uncompiled and print the reason to stderr."""
    from torch._inductor import cpp_builder  # takes seconds to import
    from torch.utils._triton import has_triton

    try:
        if device.type == "cpu":
            cpp_builder.get_cpp_compiler()  # raises here rather than in the first step
        elif not has_triton():
            raise RuntimeError("Triton is not available for this GPU")
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        print(f"--model.compile: the model runs uncompiled ({reason}).", file=sys.stderr)
        return
    model.compile()
