"""From numbers to 8-bit operands: the largest magnitude, the scale, the rounding.

Every scale is a power of two. A floating-point format loses no precision by that, at most one of its 15 (e4m3) or 30
(e5m2) powers of range; scaling is exact; and a magnitude that differs in its last bit, as after a sum in another order,
still has the same scale, where any other scale would round every number of the tensor anew.

An inf or NaN has no scale that would show it: a tensor (or block) that holds one gets the scale NaN and NaN values, so
that every product with it is NaN and whoever watches the loss sees it. A tensor of zeros has the scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .formats import LARGEST, Block


@dataclass(frozen=True)
class Operand:
    """An 8-bit matrix: ``values`` times ``scale`` is what it stands for. A product sums over its columns."""

    values: Tensor
    """(R, C), e4m3 or e5m2, row by row in memory."""
    scale: Tensor
    """fp32: () for the whole tensor, or one per block, (ceil(R / rows), ceil(C / columns))."""
    block: Block | None = None

    @property
    def transposed(self) -> Operand:
        """The same numbers as (C, R), copied. Only of an operand with one scale."""
        if self.block is not None:
            raise ValueError("the blocks of an operand run along its columns: quantise the transposed tensor instead")
        return Operand(self.values.t().contiguous(), self.scale)


def largest_magnitude(x: Tensor) -> Tensor:
    """max |x| as () fp32, and inf where x holds an inf or a NaN, so that a maximum over ranks keeps it."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    low, high = torch.aminmax(x.detach())
    return _nan_as_inf(torch.maximum(high, -low).float())


def quantise(x: Tensor, amax: Tensor, dtype: torch.dtype) -> Operand:
    """x (R, C) under one scale, with which ``amax``, () fp32, is representable; what is beyond it may saturate.

    An infinite ``amax`` makes everything NaN.
    """
    scale = _power_of_two(amax, LARGEST[dtype])
    return Operand(_rounded(x.float() / scale, dtype).contiguous(), scale)


def quantise_blocks(x: Tensor, block: Block, dtype: torch.dtype) -> Operand:
    """x (R, C) under a power of two for each block; blocks at the edges are cut off."""
    tiles = _tiles(x.detach().float(), block)
    amax = _nan_as_inf(tiles.abs().amax(dim=(1, 3)))
    scale = _power_of_two(amax, LARGEST[dtype])
    values = _rounded(tiles / scale[:, None, :, None], dtype)
    return Operand(values.flatten(2).flatten(0, 1)[: x.shape[0], : x.shape[1]].contiguous(), scale, block)


def dequantise(operand: Operand) -> Tensor:
    """The numbers that an operand stands for, (R, C) fp32."""
    values, scale = operand.values.float(), operand.scale
    if operand.block is not None:
        for dimension, size in enumerate(operand.block):
            scale = scale.repeat_interleave(size, dim=dimension)
        scale = scale[: values.shape[0], : values.shape[1]]
    return values * scale


def _tiles(x: Tensor, block: Block) -> Tensor:
    """(row blocks, rows, column blocks, columns), padded with zeros."""
    rows, columns = block
    padded = functional.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    return padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)


def _power_of_two(amax: Tensor, largest: float) -> Tensor:
    """The smallest power of two by which ``amax`` may be divided to be representable: as e8m0 holds it exactly."""
    mantissa, exponent = torch.frexp(amax / largest)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-126, 127)
    scale = torch.ldexp(torch.ones_like(amax), exponent)
    scale = torch.where(amax == 0, torch.ones_like(amax), scale)
    return torch.where(amax.isinf(), torch.full_like(amax, torch.nan), scale)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    # What rounds up beyond the largest number must not become an infinity, which e5m2 has.
    return x.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def _nan_as_inf(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), torch.full_like(x, torch.inf), x)
