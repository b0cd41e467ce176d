"""SwiGLU (arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu

from .vendor import engine_swiglu, swiglu_vendor


def swiglu(activated: Tensor, linear: Tensor) -> Tensor:
    """silu(activated) * linear, elementwise, of one shape and dtype; silu in fp32 at least, then rounded.

    torch evaluates silu of bf16 in fp32 by itself, so no wider copy is made here. On a GPU Transformer Engine's fused
    kernel where it is installed and both are halves of one tensor (``vendor``).
    """
    if swiglu_vendor(activated, linear) is not None:
        return engine_swiglu(activated, linear)
    return silu(activated) * linear
