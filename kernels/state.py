"""The state that tokens leave behind, as one differentiable matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import operand, wide_bmm


def weighted_key_values(k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    """Sum over the tokens j of weights_j k_j^T v_j, (B, H, dk, dv) in the dtype of the weights.

    k (B, H, T, dk) and v (B, H, T, dv) of one dtype, weights (B, H, T) in the accumulation dtype. Differentiable once
    in all three.
    """
    state: Tensor = _WeightedKeyValues.apply(k, v, weights)  # type: ignore[no-untyped-call]
    return state


class _WeightedKeyValues(torch.autograd.Function):
    """Written out because products of bf16 operands with an fp32 result have no derivative in torch."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(k, v, weights)
        state = wide_bmm(_weighted(k, weights).mT, operand(v).flatten(0, 1))
        return state.view(*k.shape[:2], *state.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_state: Tensor) -> tuple[Tensor, ...]:
        k, v, weights = ctx.saved_tensors
        values = operand(v).flatten(0, 1)
        upstream = grad_state.flatten(0, 1).to(values.dtype)
        grad_v = wide_bmm(_weighted(k, weights), upstream).view(v.shape)
        grad_weighted = wide_bmm(values, upstream.mT).view(k.shape)
        grad_weights = (grad_weighted * k).sum(dim=-1)
        grad_k = grad_weighted.mul_(weights.unsqueeze(-1))
        return grad_k.to(k.dtype), grad_v.to(v.dtype), grad_weights


def _weighted(k: Tensor, weights: Tensor) -> Tensor:
    """weights_j k_j as an operand (B*H, T, dk)."""
    keys = operand(k)
    return (keys * weights.unsqueeze(-1)).to(keys.dtype).flatten(0, 1)
