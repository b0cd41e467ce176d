"""The loss over a vocabulary that is cut over tensor ranks, without its logits in whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from ..kernels.cross_entropy import (
    Terms,
    add_weight_gradient,
    chunk_tokens,
    combine,
    exponentials_,
    labels_of_part,
    logit_gradients,
    logits_into,
    losses,
)
from ..kernels.precision import accumulation_dtype
from .main_gradients import add_gradient


def vocabulary_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: ProcessGroup,
    *,
    sequence_parallel: bool,
    chunk: int | None = None,
) -> Tensor:
    """Mean cross entropy of softmax(x weight^T) over all tokens, a scalar in fp32 (fp64 for fp64), equal on all ranks.

    Args:
        x: (S, B, W), the same on every rank of ``group``; (S / size, B, W), this rank's, under ``sequence_parallel``.
        weight: (V / size, W) in x's dtype, this rank's rows, in the order of ranks.
        labels: (S, B) int64, ids below V.
        chunk: tokens whose logits exist at a time; ``chunk_tokens`` by default.

    Each rank keeps, from the forward to the backward pass, the gradients of x (S, B, W) and of ``weight``, the second
    in fp32 where it is a sum over chunks, and nothing of size S x B x V. One collective of three numbers per token and
    rank is all that a chunk's softmax needs; x is gathered once, and its gradient is summed over ranks in the backward
    pass. Differentiable in x and weight, for one backward pass; a weight's gradient is added to its ``main_grad`` where
    it has one. Without gradients, only the loss is computed.
    """
    if not torch.is_grad_enabled():
        x, weight = x.detach(), weight.detach()  # or the function below would make gradients all the same
    loss: Tensor = _VocabularyLoss.apply(x, weight, labels, group, sequence_parallel, chunk)  # type: ignore[no-untyped-call]
    return loss


class _VocabularyLoss(torch.autograd.Function):
    """``vocabulary_loss``; all products are in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        group: ProcessGroup,
        sequence_parallel: bool,
        chunk: int | None,
    ) -> Tensor:
        ctx.group, ctx.sequence_parallel = group, sequence_parallel and group.size() > 1
        ctx.save_for_backward(weight)
        whole = _gathered(x, group) if ctx.sequence_parallel else x
        tokens, targets = whole.reshape(-1, x.shape[-1]), labels.reshape(-1)
        needs_dx, needs_dw, *_ = ctx.needs_input_grad
        dx, dw, total = torch.empty_like(tokens) if needs_dx else None, None, None
        for span, gradients, loss in _chunks(tokens, weight, targets, group, chunk, gradients=needs_dx or needs_dw):
            total = loss if total is None else total + loss
            if dx is not None and gradients is not None:
                torch.mm(gradients, weight, out=dx[span])
            if needs_dw and gradients is not None:
                dw = add_weight_gradient(dw, gradients, tokens[span])
        # Not saved as tensors of the graph: the backward pass takes them over, and they are no inputs or outputs.
        ctx.gradients = None if dx is None else dx.view(whole.shape), dw
        if total is None:
            raise ValueError(f"a mean over no tokens: x has the shape {tuple(x.shape)}")
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the vocabulary's loss keeps its gradients for one backward pass; call forward again")
        (dx, dw), ctx.gradients = ctx.gradients, None
        (weight,) = ctx.saved_tensors
        if dx is not None:
            dx = _summed(dx.mul_(upstream), ctx.group, ctx.sequence_parallel)
        if dw is not None and hasattr(weight, "main_grad"):
            add_gradient(weight.main_grad, dw.mul_(upstream))
            dw = None
        elif dw is not None:
            dw = dw.mul_(upstream).to(weight.dtype)
        return dx, dw, None, None, None, None


def _chunks(
    tokens: Tensor, weight: Tensor, labels: Tensor, group: ProcessGroup, chunk: int | None, *, gradients: bool
) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
    """Each chunk's place, gradient of its logits or None, and part of the mean loss; the next one overwrites them."""
    count, rows = len(tokens), len(weight)
    size = min(chunk or chunk_tokens(tokens), count)
    buffer = tokens.new_empty(size, rows, dtype=accumulation_dtype(tokens))
    first = group.rank() * rows
    for start in range(0, count, size):
        span = slice(start, min(start + size, count))
        here = labels_of_part(labels[span], first, rows)
        logits = logits_into(buffer[: span.stop - start], tokens[span], weight)
        part = exponentials_(logits, here)
        whole = _combined(part, group)
        made = logit_gradients(logits, part, whole, here, 1 / count, tokens.dtype) if gradients else None
        yield span, made, losses(whole).sum() / count


def _combined(part: Terms, group: ProcessGroup) -> Terms:
    """The terms of the whole vocabulary: every rank combines the same numbers in the same order."""
    if group.size() == 1:
        return part
    parts = _gathered(torch.stack(part), group).view(group.size(), len(part), -1)
    return combine(Terms(*parts.unbind(dim=1)))


def _gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    """x of all ranks, one after another along dimension 0."""
    whole = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def _summed(dx: Tensor, group: ProcessGroup, sequence_parallel: bool) -> Tensor:
    """The sum of dx over ranks: this rank's part of it under sequence parallelism, else all."""
    if group.size() == 1:
        return dx
    if not sequence_parallel:
        dist.all_reduce(dx, group=group)
        return dx
    mine = dx.new_empty(dx.shape[0] // group.size(), *dx.shape[1:])
    dist.reduce_scatter_tensor(mine, dx, group=group)
    return mine
