"""Rotary position embedding on interleaved pairs (2i, 2i+1) (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .precision import accumulation_dtype


def rotary_frequencies(head_dim: int, theta: float, spacing: Literal["standard", "linspace"]) -> Tensor:
    """Angle per position of each pair, (head_dim / 2,) fp32.

    ``standard``: theta^(-2i/d). ``linspace``: theta^(-i/(d/2-1)), as in RetNet and YOCO, whose last frequency
    is 1/theta. With d = 128 the two differ by up to 13 %, so one must not stand in for the other.
    """
    pairs = head_dim // 2
    if spacing == "linspace":
        exponents = torch.linspace(0, 1, pairs, dtype=torch.float64)
    else:
        exponents = torch.arange(pairs, dtype=torch.float64) / pairs
    return torch.pow(theta, -exponents).float()


def rotary_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, each (T, d/2) fp32, for positions (T,) and frequencies (d/2,).

    The angles are fp64: at position 10^6 an fp32 angle is off by several hundredths of a radian, and a bf16
    one by whole turns.
    """
    angles = torch.outer(positions.double(), frequencies.double())
    return angles.cos().float(), angles.sin().float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., T, d) by tables (T, d/2), in fp32 at least; returns x.dtype.

    A pair is a complex number and its rotation a product with e^{i angle}: one pass forward and one backward.
    """
    wide = accumulation_dtype(x)
    out: Tensor = _Rotation.apply(x, torch.complex(cos.to(wide), sin.to(wide)))  # type: ignore[no-untyped-call]
    return out


class _Rotation(torch.autograd.Function):
    """Pairs times ``rotation``, and their gradients times its conjugate; autograd's own chain of views would copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        pairs = torch.view_as_complex(_even(x.to(accumulation_dtype(x))).view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (rotation,) = ctx.saved_tensors
        return _Rotation.apply(upstream, rotation.conj()), None  # type: ignore[no-untyped-call]


def _even(x: Tensor) -> Tensor:
    """x, copied where it cannot be seen as complex: a slice of a fused projection may be oddly strided."""
    even = x.stride(-1) == 1 and not x.storage_offset() % 2 and not any(s % 2 for s in x.stride()[:-1])
    return x if even else x.clone(memory_format=torch.contiguous_format)
