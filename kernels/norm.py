"""RMSNorm (arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .precision import accumulation_dtype
from .vendor import norm_vendor, vendor_rms_norm


class HeadNorm(NamedTuple):
    """What is done to each row of a head's output: rms_norm(row, weight, eps) * scale."""

    weight: Tensor | None
    """(dv,) fp32, which all heads share; None without one."""
    eps: float
    scale: float


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times ``weight`` (d,) where given; returns x.dtype.

    Statistics in fp32 at least. The result stays in x.dtype under a wider weight too, because a promoted
    result would only fail later, at the next projection. On a GPU apex's or Transformer Engine's where they are
    installed and take these types (``vendor``), else torch's own fused norm. On a CPU torch has none: it makes a dozen
    passes over x in fp32.
    """
    if x.device.type == "cpu":
        out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return out
    if weight is not None and (vendor := norm_vendor(x.device, x.dtype, weight.dtype)) is not None:
        return vendor_rms_norm(vendor, x, weight, eps)
    if weight is None or weight.dtype == x.dtype:
        return functional.rms_norm(x, x.shape[-1:], weight, eps)
    wide = accumulation_dtype(x)
    return functional.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps).to(x.dtype)


def apply_head_norm(x: Tensor, norm: HeadNorm) -> Tensor:
    """The norm of every row of x (B, h, T, dv), dtype kept; a token's heads lie side by side in the result."""
    tokens = x.permute(2, 0, 1, 3)
    if norm.weight is None:
        return rms_norm(tokens, None, norm.eps).mul(norm.scale).permute(1, 2, 0, 3)
    return rms_norm(tokens, norm.weight * norm.scale, norm.eps).permute(1, 2, 0, 3)


class _RMSNorm(torch.autograd.Function):
    """``rms_norm`` in few passes: the sums over a row, and those over all rows, are products with a vector."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = accumulation_dtype(x)
        rows = x.reshape(-1, x.shape[-1]).to(wide)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        inverse = norms.square_().div_(rows.shape[1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        out: Tensor = rows * inverse
        if weight is not None:
            out *= weight
        return out.view(x.shape).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """With y = x / r, r the root of the mean square: dx = (dy w - y mean(dy w y)) / r and dw = sum of dy y."""
        x, weight, inverse = ctx.saved_tensors
        width, wide = x.shape[-1], accumulation_dtype(x)
        rows, dy = (t.reshape(-1, width).to(wide) for t in (x, upstream))
        w = rows.new_ones(width) if weight is None else weight.to(wide)
        products = rows * dy
        d_weight = None if weight is None else torch.mv(products.mT, inverse.view(-1)).to(weight.dtype)
        along = torch.mv(products, w).unsqueeze(1).mul_(inverse.square()).div_(-width)
        dx = torch.mul(rows, along, out=products).addcmul_(dy, w).mul_(inverse)
        return dx.view(x.shape).to(x.dtype), d_weight, None
