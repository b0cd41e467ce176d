"""What torch's product of 8-bit blocks is documented to read, element by element, for machines that have no such product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

_TORCHS = torch.nn.functional.scaled_mm


def scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    kind_a: ScalingType,
    scale_b: Tensor,
    kind_b: ScalingType,
    swizzle_a: SwizzleType | None = None,
    swizzle_b: SwizzleType | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a (M, K) by b (K, N) as ``torch.nn.functional.scaled_mm``, which takes the same arguments."""
    meta = [x.to("meta") for x in (a, b, scale_a, scale_b)]
    _TORCHS(  # raises what torch says of other shapes, strides and types
        meta[0], meta[1], meta[2], kind_a, meta[3], kind_b, swizzle_a, swizzle_b, output_dtype=output_dtype
    )
    left = a.float() * scales(scale_a, kind_a, a.shape[0], a.shape[1])
    right = b.t().float() * scales(scale_b, kind_b, b.shape[1], b.shape[0])
    return (left @ right.t()).to(output_dtype)


def scales(scale: Tensor, kind: Any, rows: int, columns: int) -> Tensor:
    """The scale of every element of an operand (rows, columns) that is summed over its columns."""
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    if kind == ScalingType.BlockWise1x128:
        return scale[row, column // 128]
    if kind == ScalingType.BlockWise128x128:  # down the sum first, in fours
        return scale[column // 128, row // 128]
    # Tiles of 128 rows by 4 blocks, one after another along the rows; in each, rows r, r + 32, r + 64 and r + 96 together
    # (docs.nvidia.com/cuda/cublas, layout of one-dimensional block scaling factors).
    block = column // 32
    tiles = -(-columns // 128)
    offset = (row // 128 * tiles + block // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
    return scale.flatten().float()[offset]
