"""RMSNorm (arXiv 1910.07467)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from .precision import accumulation_dtype


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times ``weight`` (d,) where given; returns x.dtype.

    Statistics in fp32 at least. The result stays in x.dtype under a wider weight too, because a promoted
    result would only fail later, at the next projection.
    """
    if weight is None or weight.dtype == x.dtype:
        return functional.rms_norm(x, x.shape[-1:], weight, eps)
    wide = accumulation_dtype(x)
    return functional.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps).to(x.dtype)
