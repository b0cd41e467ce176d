"""SwiGLU (arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu


def swiglu(activated: Tensor, linear: Tensor) -> Tensor:
    """silu(activated) * linear, elementwise, of one shape and dtype; silu in fp32 at least, then rounded.

    torch evaluates silu of bf16 in fp32 by itself, so no wider copy is made here.
    """
    return silu(activated) * linear
