"""No fast path creates a tensor that grows with the square of the sequence length, forward or backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.attention import attention
from trine.kernels.differential import differential_attention, differential_attention_v2
from trine.kernels.retention import fixed_decay_log, retention

Randn = Callable[..., Tensor]
Function = Callable[..., Any]
Inputs = Callable[[Function], list[Tensor]]
Measure = Callable[[Function, list[Tensor]], int]

LENGTH, WIDTH = 2048, 8
SQUARE = LENGTH * LENGTH


def retention_gated(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return retention(q, k, v, -gate.square(), **options)


def retention_fixed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return retention(q, k, v, fixed_decay_log(1), **options)


def retention_packed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    resets = (torch.arange(LENGTH) % 300 == 0).unsqueeze(0)
    return retention(q, k, v, fixed_decay_log(1), resets=resets, **options)


def attention_packed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    index = torch.arange(LENGTH)
    return attention(q, k, v, document_start=(index - index % 1500).unsqueeze(0), **options)


def attention_wide(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return attention(q, k, v, **options)


CASES: dict[Function, list[tuple[int, int]]] = {
    attention: [(2, WIDTH), (1, WIDTH), (1, WIDTH)],
    attention_wide: [(2, WIDTH), (1, WIDTH), (1, 2 * WIDTH)],
    attention_packed: [(2, WIDTH), (1, WIDTH), (1, WIDTH)],
    differential_attention: [(2, WIDTH), (2, WIDTH), (1, 2 * WIDTH)],
    differential_attention_v2: [(2, WIDTH), (1, WIDTH), (1, WIDTH)],
    retention_fixed: [(1, WIDTH), (1, WIDTH), (1, WIDTH)],
    retention_packed: [(1, WIDTH), (1, WIDTH), (1, WIDTH)],
    retention_gated: [(1, WIDTH), (1, WIDTH), (1, WIDTH)],
}
"""Heads and widths of q, k and v."""


EXTRA: dict[Function, tuple[int, ...]] = {
    differential_attention: (),
    differential_attention_v2: (1, 1, LENGTH),
    retention_gated: (1, 1, LENGTH),
}
"""Shapes of the fourth input: lam or gate."""


@pytest.fixture
def make_inputs(randn: Randn) -> Inputs:
    def make(function: Function) -> list[Tensor]:
        inputs = [randn(1, heads, LENGTH, width, dtype=torch.float32) for heads, width in CASES[function]]
        return inputs + ([randn(*EXTRA[function], dtype=torch.float32)] if function in EXTRA else [])

    return make


@pytest.mark.parametrize("function", CASES)
def test_nothing_quadratic_is_created(
    make_inputs: Inputs, largest_tensor: Measure, function: Function
) -> None:
    assert largest_tensor(function, make_inputs(function)) <= SQUARE / 8


@pytest.mark.parametrize("function", CASES)
def test_the_measure_sees_the_reference(
    make_inputs: Inputs, largest_tensor: Measure, function: Function
) -> None:
    inputs = make_inputs(function)
    assert largest_tensor(lambda *x: function(*x, backend="reference"), inputs) >= SQUARE


@pytest.mark.parametrize("queries", [2 * LENGTH, 64])
def test_a_window_makes_no_tensor_longer_than_the_inputs(
    randn: Randn, largest_tensor: Measure, queries: int
) -> None:
    lengths = (queries, 2 * LENGTH, 2 * LENGTH)
    q, k, v = (randn(1, 1, length, WIDTH, dtype=torch.float32) for length in lengths)
    assert largest_tensor(lambda *x: attention(*x, window=100), [q, k, v]) <= k.numel()


def test_more_heads_make_no_larger_tile(randn: Randn, largest_tensor: Measure) -> None:
    """70 heads with maps of 128 whole rows in a tile would exceed the 2^18 elements that stay in cache."""
    q, k, v = randn(7, 10, 257, 4), randn(7, 10, 257, 4), randn(7, 10, 257, 5)
    assert 2**17 <= largest_tensor(attention, [q, k, v]) <= 2**18
