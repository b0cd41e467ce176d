"""The buffers in which Megatron-Core sums a step's gradients: ``main_grad`` of each parameter is a view of one.

Megatron-Core zeroes them before a step and adds every gradient. Here they are left as they are, stale, and the first
gradient of a parameter is written over them, which saves two passes over memory; a parameter that got none by the end
of the step is zeroed then. Fused kernels of other packages only add: where they are in use, Megatron-Core zeroes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def overwrites(main_grad: Tensor) -> bool:
    """Whether what ``main_grad`` holds is of an earlier step; asked by whoever is about to write to it."""
    stale = getattr(main_grad, "stale", False)
    main_grad.stale = False  # type: ignore[attr-defined]
    return stale


def add_gradient(main_grad: Tensor, gradient: Tensor) -> None:
    """Add ``gradient``, of any dtype, to the sum of the step."""
    if overwrites(main_grad):
        main_grad.copy_(gradient)
    else:
        main_grad.add_(gradient)


def add_product(main_grad: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b, of a (N, T) and b (T, K) in one dtype, to ``main_grad`` (N, K): in one pass where it has that dtype."""
    if a.dtype != main_grad.dtype:
        add_gradient(main_grad, torch.mm(a, b))
    else:
        torch.addmm(main_grad, a, b, beta=0 if overwrites(main_grad) else 1, out=main_grad)


def add_rows(main_grad: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add each of ``rows`` (n, W), of any dtype, to the row of ``main_grad`` (V, W) that ``index`` (n,) names."""
    if overwrites(main_grad):
        main_grad.zero_()
    main_grad.index_add_(0, index, rows.to(main_grad.dtype))
