"""The two 8-bit formats, and which of them and which blocks a recipe uses.

e4m3 has three bits of mantissa and reaches 448; e5m2 has two and reaches 57344 (arXiv 2209.05433). ``delayed`` and
``tensorwise`` have one scale per tensor, e4m3 for activations and weights and e5m2 for gradients, whose range is wide.
``blockwise`` has one scale per 128 numbers of an activation or gradient and per 128 x 128 of a weight (arXiv
2412.19437); ``mxfp8`` one per 32 numbers of everything, along the dimension that the product sums over (OCP
Microscaling Formats v1.0). In both e4m3 serves both ways.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2

LARGEST = {E4M3: 448.0, E5M2: 57344.0}
"""The largest finite number of each format."""

Block = tuple[int, int]
"""Rows and columns of an operand that share a scale; columns run along the dimension that a product sums over."""


@dataclass(frozen=True)
class Scaling:
    """What a recipe does to the operands of a product."""

    gradient: torch.dtype
    """Format of gradients; activations and weights are e4m3."""
    rows: Block | None = None
    """Block of activations and gradients; None is one scale for the whole tensor."""
    weight: Block | None = None
    """Block of weights."""

    @property
    def unit(self) -> int:
        """What summed dimensions must be a multiple of, so that blocks do not depend on how a tensor is divided."""
        return 1 if self.rows is None else self.rows[1]


SCALINGS = {
    "tensorwise": Scaling(E5M2),
    "delayed": Scaling(E5M2),
    "blockwise": Scaling(E4M3, rows=(1, 128), weight=(128, 128)),
    "mxfp8": Scaling(E4M3, rows=(1, 32), weight=(1, 32)),
}
"""By the name of the recipe."""
