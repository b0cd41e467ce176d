"""RMSNorm (arXiv 1910.07467)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
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
    installed and take these types (``vendor``), else torch's own fused norm.
    """
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
