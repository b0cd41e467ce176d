"""Differential attention, versions 1 and 2, against the naive reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.configs.errors import UsageError
from trine.kernels import reference
from trine.kernels.differential import differential_attention, differential_attention_v2

Randn = Callable[..., Tensor]
Check = Callable[..., None]

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.usefixtures("either_tile")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pairs", "kv_pairs"), [(3, 3), (6, 2)])
@pytest.mark.parametrize("length", [1, 7, 63, 130, 257])
def test_v1_matches_the_reference(
    randn: Randn, assert_same: Check, length: int, pairs: int, kv_pairs: int, dtype: torch.dtype
) -> None:
    q, k = randn(2, 2 * pairs, length, 12, dtype=dtype), randn(2, 2 * kv_pairs, length, 12, dtype=dtype)
    v, lam = randn(2, kv_pairs, length, 24, dtype=dtype), randn(dtype=dtype)
    assert_same(differential_attention, reference.differential_attention, [q, k, v, lam])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2)])
@pytest.mark.parametrize("length", [1, 7, 63, 130, 257])
def test_v2_matches_the_reference(
    randn: Randn, assert_same: Check, length: int, heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    q = randn(2, 2 * heads, length, 12, dtype=dtype)
    k, v = (randn(2, kv_heads, length, 12, dtype=dtype) for _ in range(2))
    lam = randn(2, heads, length, dtype=dtype)
    assert_same(
        lambda q, k, v, lam: differential_attention_v2(q, k, v, lam.sigmoid()),
        lambda q, k, v, lam: reference.differential_attention_v2(q, k, v, lam.sigmoid()),
        [q, k, v, lam],
    )


def test_v1_is_the_difference_of_two_ordinary_attentions(randn: Randn) -> None:
    """The decomposition of the published code: one call per map, over the same values."""
    q, k, v = randn(1, 4, 70, 8), randn(1, 4, 70, 8), randn(1, 2, 70, 16)
    first, second = (reference.attention(q[:, s::2], k[:, s::2], v) for s in (0, 1))
    output = differential_attention(q, k, v, torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(output, first - 0.3 * second, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("either_tile")
def test_v1_fewer_queries_than_keys_are_the_last_ones(randn: Randn, assert_same: Check) -> None:
    q, k, v = randn(2, 4, 70, 8), randn(2, 4, 130, 8), randn(2, 2, 130, 16)
    assert_same(differential_attention, reference.differential_attention, [q, k, v, randn()])


@pytest.mark.parametrize("window", [2, 30, 64, 90, 200])
@pytest.mark.parametrize(("queries", "keys"), [(1, 130), (70, 130), (257, 257)])
def test_v1_window(randn: Randn, assert_same: Check, queries: int, keys: int, window: int) -> None:
    q, k, v = randn(2, 8, queries, 12), randn(2, 4, keys, 12), randn(2, 2, keys, 20)
    assert_same(
        lambda *x: differential_attention(*x, window=window),
        lambda *x: reference.differential_attention(*x, window),
        [q, k, v, randn()],
    )


@pytest.mark.parametrize("window", [30, 200])
def test_v2_window(randn: Randn, assert_same: Check, window: int) -> None:
    q, k, v, lam = randn(2, 8, 70, 12), randn(2, 2, 130, 12), randn(2, 2, 130, 12), randn(2, 4, 70)
    assert_same(
        lambda *x: differential_attention_v2(*x, window=window),
        lambda *x: reference.differential_attention_v2(*x, window),
        [q, k, v, lam],
    )


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_a_window_of_one_token_leaves_its_own_value(randn: Randn, backend: Any) -> None:
    q, k, v = (randn(2, heads, 19, width, dtype=torch.float32) for heads, width in ((4, 8), (4, 8), (2, 16)))
    output = differential_attention(q, k, v, torch.tensor(0.25), window=1, backend=backend)
    torch.testing.assert_close(output, 0.75 * v)


def test_v1_lambda_may_be_wider_than_the_heads(randn: Randn) -> None:
    q, k, v = (randn(1, heads, 9, width, dtype=torch.bfloat16) for heads, width in ((4, 8), (4, 8), (2, 16)))
    lam = randn(dtype=torch.float32)
    output = differential_attention(q, k, v, lam)
    (grad,) = torch.autograd.grad(output.float().sum(), lam)
    assert (output.dtype, grad.dtype) == (torch.bfloat16, torch.float32)


def test_v1_gradcheck(randn: Randn) -> None:
    inputs = (randn(1, 4, 5, 3), randn(1, 2, 5, 3), randn(1, 1, 5, 4), randn())
    assert torch.autograd.gradcheck(differential_attention, inputs)


@pytest.mark.parametrize(
    ("heads", "key_heads", "value_heads", "lam_shape", "message"),
    [
        (5, 4, 2, (), "5 query, 4 key and 2 value heads"),
        (4, 4, 4, (), "4 query, 4 key and 4 value heads"),
        (6, 4, 2, (), "6 query, 4 key and 2 value heads"),
        (4, 4, 2, (1,), r"lam of shape \(1,\)"),
    ],
)
def test_v1_wrong_shapes_are_named(
    randn: Randn, heads: int, key_heads: int, value_heads: int, lam_shape: tuple[int, ...], message: str
) -> None:
    q, k, v = randn(1, heads, 5, 4), randn(1, key_heads, 5, 4), randn(1, value_heads, 5, 8)
    with pytest.raises(UsageError, match=message):
        differential_attention(q, k, v, randn(*lam_shape))


@pytest.mark.parametrize(
    ("kv_heads", "lam_shape", "message"),
    [(4, (1, 2, 5), "4 query, 4 key and 4 value heads"), (2, (1, 4, 5), r"lam of shape \(1, 4, 5\)")],
)
def test_v2_wrong_shapes_are_named(
    randn: Randn, kv_heads: int, lam_shape: tuple[int, ...], message: str
) -> None:
    q, k = randn(1, 4, 5, 4), randn(1, kv_heads, 5, 4)
    with pytest.raises(UsageError, match=message):
        differential_attention_v2(q, k, k, randn(*lam_shape))
