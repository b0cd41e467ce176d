"""Between the engine's layout of activations and the kernels': (S, B, heads * d) and (B, heads, S, d)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..configs.stack import Rotary
from ..kernels.rotary import apply_rotary, rotary_frequencies, rotary_tables
from ..parallel.context import SequenceShare


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(S, B, heads * d) -> (B, heads, S, d), a view."""
    return x.view(*x.shape[:2], heads, -1).permute(1, 2, 0, 3)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, S, d) -> (S, B, heads * d)."""
    return x.permute(2, 0, 1, 3).flatten(2)


@lru_cache(maxsize=32)
def _tables(share: SequenceShare, head_dim: int, rope: Rotary, device: torch.device) -> tuple[Tensor, Tensor]:
    frequencies = rotary_frequencies(head_dim, rope.theta, rope.spacing).to(device)
    return rotary_tables(share.positions.to(device), frequencies)


def rotate(x: Tensor, rope: Rotary, share: SequenceShare) -> Tensor:
    """Rotary embedding of (B, heads, S_local, d) at the positions that this rank holds, in fp32, cast back.

    Positions count from the start of the window, also within later documents: only their differences matter.
    """
    cos, sin = _tables(share, x.shape[-1], rope, x.device)
    return apply_rotary(x, cos, sin)
