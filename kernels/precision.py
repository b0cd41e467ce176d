"""In which precision the kernels multiply and accumulate."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 tensors, else fp32: the dtype of softmax maps, decays, states and statistics."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def operand(x: Tensor) -> Tensor:
    """``x`` in the dtype in which its matrix products run: its own on a GPU, at least fp32 on a CPU.

    A CPU has no batched product of bf16 operands with an fp32 result; the one with a bf16 result loses the
    precision that softmax and states need and, without bf16 instructions, is several times slower than fp32.
    """
    return x.to(accumulation_dtype(x)) if x.device.type == "cpu" else x


def wide_bmm(a: Tensor, b: Tensor) -> Tensor:
    """(N, m, k) by (N, k, n), both as ``operand`` gives them; the result is in the accumulation dtype."""
    dtype = accumulation_dtype(a)
    return torch.bmm(a, b) if a.dtype == dtype else torch.bmm(a, b, out_dtype=dtype)


def accumulate_bmm_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total += a @ b`` in place, with ``total`` in the accumulation dtype, a and b as for ``wide_bmm``."""
    return total.baddbmm_(a, b) if a.dtype == total.dtype else total.add_(wide_bmm(a, b))
