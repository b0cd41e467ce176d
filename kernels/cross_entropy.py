"""Cross entropy of a vocabulary's logits, fused with the product that makes them: a chunk of tokens at a time.

A chunk's logits are turned at once into its part of the gradients and overwritten by the next chunk's, so that no
tensor of tokens x vocabulary exists. That works because a mean is differentiated: but for one factor, which the caller
applies at the end, the gradient of every token's loss is known as soon as its softmax is. The products are the three of
any linear map: logits, dX and dW.

The vocabulary may be cut into parts. These functions see one part; ``combine`` takes what all parts say of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .precision import accumulation_dtype

CHUNK_ON_CPU = 512
CHUNK_OF_HALVES_ON_CPU = 1024
CHUNK_ON_GPU = 4096
"""Tokens of a chunk. Every chunk costs a pass over dW to add to it, whatever its size, so a chunk needs enough products
per element of dW to hide that: the more, the faster products are against memory. From here on larger ones gain nothing
on a CPU (with AVX-512 or AMX). The number for a GPU follows from the ratio of an H200, 190 operations per byte: 6 c
operations per element against the 16 bytes of a pass make 1500."""


class Terms(NamedTuple):
    """What one part of the vocabulary says of each token of a chunk; (c,) each, fp32 at least."""

    maximum: Tensor
    """The largest logit."""
    total: Tensor
    """The sum of exp(logit - maximum)."""
    label: Tensor
    """The label's logit, or 0 where it belongs to another part."""


class Labels(NamedTuple):
    """Where the labels of a chunk are in one part of the vocabulary; (c,) each."""

    column: Tensor
    """int64, within the part; any where the label is elsewhere."""
    here: Tensor
    """bool: whether the label belongs to this part."""


def chunk_tokens(x: Tensor) -> int:
    """How many tokens of x a chunk takes."""
    if x.device.type != "cpu":
        return CHUNK_ON_GPU
    return CHUNK_ON_CPU if x.dtype == accumulation_dtype(x) else CHUNK_OF_HALVES_ON_CPU


def labels_of_part(labels: Tensor, first: int, rows: int) -> Labels:
    """``labels`` (c,), global ids, as seen by the part of the vocabulary that starts at ``first`` and has ``rows``."""
    local = labels - first
    return Labels(local.clamp(0, rows - 1), (local >= 0) & (local < rows))


def logits_into(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """x (c, W) times weight (V, W) transposed, as (c, V) in the accumulation dtype; written to ``out`` or newly made.

    Operands stay in their dtype, as in every linear map of the model: on a CPU the product of bf16 operands is rounded
    to bf16, which costs a third of fp32's time with bf16 instructions; on a GPU it is not rounded.
    """
    if x.dtype == out.dtype:
        return torch.mm(x, weight.mT, out=out)
    return out.copy_(_wide_mm(x, weight.mT))


def exponentials_(logits: Tensor, labels: Labels) -> Terms:
    """Replace ``logits`` (c, V) by exp(logit - largest of the row), and say what they were."""
    maximum = logits.amax(dim=1)
    label = logits.gather(1, labels.column.unsqueeze(1)).squeeze(1)
    logits.sub_(maximum.unsqueeze(1)).exp_()
    return Terms(maximum, logits.sum(dim=1), torch.where(labels.here, label, 0.0))


def combine(parts: Terms) -> Terms:
    """The terms of the whole vocabulary, (c,), from those of all parts, (parts, c)."""
    maximum = parts.maximum.amax(dim=0)
    total = (parts.total * (parts.maximum - maximum).exp()).sum(dim=0)
    return Terms(maximum, total, parts.label.sum(dim=0))


def losses(whole: Terms) -> Tensor:
    """-log softmax at the label, (c,), of the terms of the whole vocabulary."""
    return whole.total.log() - (whole.label - whole.maximum)


def logit_gradients(
    exponentials: Tensor, part: Terms, whole: Terms, labels: Labels, scale: float, dtype: torch.dtype
) -> Tensor:
    """(softmax - one-hot of the label) * scale, (c, V) in ``dtype``; takes ``exponentials`` over.

    The difference is taken before it is rounded to ``dtype``: at a label of a probability near 1 nothing else is left.
    """
    factor = (part.maximum - whole.maximum).exp() / whole.total * scale
    rows = torch.arange(len(factor), device=factor.device)
    at_label = exponentials[rows, labels.column] * factor - scale * labels.here.to(factor)
    if dtype == exponentials.dtype or exponentials.device.type == "cpu":
        out = exponentials.mul_(factor.unsqueeze(1)).to(dtype)  # on a CPU three times as fast as one mixed operation
    else:
        out = torch.empty_like(exponentials, dtype=dtype)
        torch.mul(exponentials, factor.unsqueeze(1), out=out)
    out[rows, labels.column] = at_label.to(dtype)
    return out


def add_weight_gradient(total: Tensor | None, gradients: Tensor, x: Tensor) -> Tensor:
    """``total`` + gradients^T x, (V, W), in place where it can; what it returns is the next chunk's ``total``.

    Sums are in the accumulation dtype. The first product, no sum, stays as ``_wide_mm`` gives it.
    """
    if total is not None and total.dtype == x.dtype == accumulation_dtype(x):
        return total.addmm_(gradients.mT, x)
    product = _wide_mm(gradients.mT, x)
    return product if total is None else total.to(accumulation_dtype(x)).add_(product)


def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, which only a GPU can give in the accumulation dtype without rounding; a CPU gives it in a's."""
    dtype = accumulation_dtype(a)
    return torch.mm(a, b) if a.dtype == dtype or a.device.type == "cpu" else torch.mm(a, b, out_dtype=dtype)
