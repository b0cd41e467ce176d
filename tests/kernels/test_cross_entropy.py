"""The vocabulary's loss in chunks, against torch in fp64 on whole logits; one part of the vocabulary and several."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trine.kernels.cross_entropy import (
    CHUNK_ON_GPU,
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
from trine.kernels.precision import accumulation_dtype

Randn = Callable[..., Tensor]

TOKENS, WIDTH, VOCABULARY = 23, 12, 40
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Relative errors of norms: rounding of each format, of the operands and gradients in the last."""


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def in_parts(x: Tensor, weight: Tensor, labels: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of every token, dX and dW of the mean loss, one part of the vocabulary after another."""
    rows = len(weight) // parts
    places = [labels_of_part(labels, first, rows) for first in range(0, len(weight), rows)]
    weights = weight.split(rows)
    logits = [logits_into(torch.empty(len(x), rows, dtype=accumulation_dtype(x)), x, w) for w in weights]
    terms = [exponentials_(one, place) for one, place in zip(logits, places, strict=True)]
    whole = combine(Terms(*(torch.stack(one) for one in zip(*terms, strict=True))))
    gradients = [
        logit_gradients(one, part, whole, place, 1 / len(x), x.dtype)
        for one, part, place in zip(logits, terms, places, strict=True)
    ]
    dx = torch.stack([g.double() @ w.double() for g, w in zip(gradients, weights, strict=True)]).sum(0)
    return losses(whole), dx, torch.cat([add_weight_gradient(None, g, x) for g in gradients])


def expected_of(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    exact_x, exact_weight = (t.double().requires_grad_() for t in (x, weight))
    loss = cross_entropy(exact_x @ exact_weight.mT, labels, reduction="none")
    return loss.detach(), *torch.autograd.grad(loss.mean(), (exact_x, exact_weight))


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("dtype", LIMITS)
def test_parts_of_the_vocabulary(randn: Randn, dtype: torch.dtype, parts: int) -> None:
    x, weight = randn(TOKENS, WIDTH, dtype=dtype).detach(), randn(VOCABULARY, WIDTH, dtype=dtype).detach()
    labels = torch.arange(TOKENS) * 7 % VOCABULARY
    for found, expected in zip(in_parts(x, weight, labels, parts), expected_of(x, weight, labels), strict=True):
        assert relative(found, expected) < LIMITS[dtype]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("label", [0, VOCABULARY - 1])
def test_logits_far_apart(parts: int, label: int) -> None:
    """exp of the differences is 0 or overflows: a label of probability 1, and one of probability 0."""
    x, weight = torch.ones(1, 1), torch.zeros(VOCABULARY, 1)
    weight[0] = 1000.0
    loss, dx, dw = in_parts(x, weight, torch.tensor([label]), parts)
    assert loss.tolist() == [0.0 if label == 0 else 1000.0]
    assert dx.tolist() == [[0.0 if label == 0 else 1000.0]]
    assert dw[[0, -1]].flatten().tolist() == ([0.0, 0.0] if label == 0 else [1.0, -1.0])


def test_a_confident_label_keeps_its_gradient_in_bf16() -> None:
    """p - 1 is -5e-4 there, and p itself would be rounded to 1."""
    x, weight = torch.ones(1, 1, dtype=torch.bfloat16), torch.zeros(VOCABULARY, 1, dtype=torch.bfloat16)
    weight[3] = 11.25
    labels = torch.tensor([3])
    _, _, dw = in_parts(x, weight, labels, 1)
    assert relative(dw[3], expected_of(x, weight, labels)[2][3]) < 2**-7


def test_weight_gradients_of_halves_are_summed_in_fp32() -> None:
    """1 + 2^-10 is not a number of bf16."""
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    total = add_weight_gradient(None, one, one)
    total = add_weight_gradient(total, one, one * 2**-10)
    assert total.dtype == torch.float32
    assert total.item() == 1 + 2**-10


def test_on_a_gpu_products_are_not_rounded_and_chunks_are_larger() -> None:
    """On the meta device, which takes a GPU's way without numbers."""
    x, weight = (torch.empty(n, WIDTH, dtype=torch.bfloat16, device="meta") for n in (TOKENS, VOCABULARY))
    logits = logits_into(torch.empty(TOKENS, VOCABULARY, device="meta"), x, weight)
    labels = labels_of_part(torch.empty(TOKENS, dtype=torch.int64, device="meta"), 0, VOCABULARY)
    terms = exponentials_(logits, labels)
    gradients = logit_gradients(logits, terms, terms, labels, 1.0, x.dtype)
    total = add_weight_gradient(add_weight_gradient(None, gradients, x), gradients, x)
    assert (gradients.dtype, total.dtype, total.shape) == (torch.bfloat16, torch.float32, weight.shape)
    assert chunk_tokens(x) == CHUNK_ON_GPU


def test_chunks_are_larger_where_products_are_faster() -> None:
    fp32, bf16 = (chunk_tokens(torch.empty(1, 1, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert fp32 < bf16 < CHUNK_ON_GPU
