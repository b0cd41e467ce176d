"""SwiGLU (arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .adjacent import empty_parts
from .vendor import engine_swiglu, swiglu_vendor


def swiglu(activated: Tensor, linear: Tensor) -> Tensor:
    """silu(activated) * linear, elementwise, of one shape and dtype; silu in fp32 at least, then rounded.

    torch evaluates silu of bf16 in fp32 by itself, so no wider copy is made here. On a GPU Transformer Engine's fused
    kernel where it is installed and both are halves of one tensor (``vendor``).
    """
    if swiglu_vendor(activated, linear) is not None:
        return engine_swiglu(activated, linear)
    out: Tensor = _Swiglu.apply(activated, linear)  # type: ignore[no-untyped-call]
    return out


class _Swiglu(torch.autograd.Function):
    """``swiglu``; keeps only its inputs, and gives their gradients as adjacent parts of one tensor.

    So whoever cut the inputs out of one product gets the gradient of that product without a copy, and the backward
    pass makes no tensor besides.
    """

    @staticmethod
    def forward(ctx: Any, activated: Tensor, linear: Tensor) -> Tensor:
        ctx.save_for_backward(activated, linear)
        out = activated.new_empty(activated.shape)
        return torch.ops.aten.silu.out(activated, out=out).mul_(linear)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        activated, linear = ctx.saved_tensors
        d_activated, d_linear = empty_parts((activated, linear))
        torch.ops.aten.silu.out(activated, out=d_linear).mul_(upstream)
        torch.mul(upstream, linear, out=d_activated)
        torch.ops.aten.silu_backward.grad_input(d_activated, activated, grad_input=d_activated)
        return d_activated, d_linear
