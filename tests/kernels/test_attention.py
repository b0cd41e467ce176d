"""Softmax attention against the naive reference: grouped heads, windows, unequal widths and lengths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trine.configs.errors import UsageError
from trine.kernels import reference
from trine.kernels.attention import attention
from trine.kernels.tiled import tiled_attention

Randn = Callable[..., Tensor]
Check = Callable[..., None]

LENGTHS = [1, 7, 63, 130, 257, 530]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.usefixtures("either_tile")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 20, 64, 129, 1000])
@pytest.mark.parametrize("length", LENGTHS)
def test_matches_the_reference(
    randn: Randn, assert_same: Check, length: int, window: int | None, dtype: torch.dtype
) -> None:
    q, k, v = (randn(2, heads, length, 12, dtype=dtype) for heads in (6, 2, 2))
    assert_same(
        lambda *x: attention(*x, window=window), lambda *x: reference.attention(*x, window), [q, k, v]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_width", [5, 40])
@pytest.mark.parametrize("kv_heads", [1, 3, 6])
def test_values_of_another_width(
    randn: Randn, assert_same: Check, kv_heads: int, value_width: int, dtype: torch.dtype
) -> None:
    q, k = randn(1, 6, 130, 12, dtype=dtype), randn(1, kv_heads, 130, 12, dtype=dtype)
    v = randn(1, kv_heads, 130, value_width, dtype=dtype)
    assert_same(attention, reference.attention, [q, k, v])


@pytest.mark.parametrize("window", [None, 1, 30, 90, 200])
@pytest.mark.parametrize(("queries", "keys"), [(1, 130), (70, 130), (129, 130)])
def test_fewer_queries_than_keys_are_the_last_ones(
    randn: Randn, assert_same: Check, queries: int, keys: int, window: int | None
) -> None:
    q, k, v = randn(2, 4, queries, 12), randn(2, 2, keys, 12), randn(2, 2, keys, 12)
    assert_same(
        lambda *x: attention(*x, window=window), lambda *x: reference.attention(*x, window), [q, k, v]
    )


def test_a_window_equals_the_last_tokens_alone(randn: Randn) -> None:
    q, k, v = (randn(1, 2, 150, 8) for _ in range(3))
    last = attention(q, k, v, window=40)[:, :, -1:]
    torch.testing.assert_close(
        last, attention(q[:, :, -1:], k[:, :, -40:], v[:, :, -40:]), rtol=0, atol=1e-12
    )


def test_the_reference_agrees_with_torch(randn: Randn) -> None:
    q, k, v = (randn(2, 4, 33, 12) for _ in range(3))
    expected = scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(reference.attention(q, k, v), expected, rtol=0, atol=1e-12)


def test_many_lanes_are_worked_off_in_parts(randn: Randn, assert_same: Check) -> None:
    # 70 lanes of maps of 128 whole rows exceed the 2^18 elements of one tile.
    q, k, v = (randn(7, 10, 257, 4) for _ in range(3))
    assert_same(tiled_attention, reference.attention, [q, k, v])


@pytest.mark.usefixtures("either_tile")
@pytest.mark.parametrize("window", [None, 1030])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_rows_of_many_tiles(
    randn: Randn, assert_same: Check, packed: Callable[[list[list[int]]], Tensor], window: int | None, scale: float
) -> None:
    """The largest score of a row may come late, and whole tiles may hold none that it sees."""
    q, k, v = (randn(1, heads, 1300, 4) for heads in (2, 1, 1))
    starts = packed([[3, 700, 597]])

    def scaled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v: function(q * scale, k, v)

    assert_same(
        scaled(lambda *x: tiled_attention(*x, window=window, document_start=starts)),
        scaled(lambda *x: reference.attention(*x, window, starts)),
        [q, k, v],
    )


def test_permuted_inputs_need_no_copy_by_the_caller(randn: Randn, assert_same: Check) -> None:
    q, k, v = (randn(70, 2, 4, 12) for _ in range(3))

    def permuted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *x: function(*(y.permute(1, 2, 0, 3) for y in x))

    assert_same(
        permuted(lambda *x: attention(*x, window=20)),
        permuted(lambda *x: reference.attention(*x, 20)),
        [q, k, v],
    )


@pytest.mark.usefixtures("either_tile")
def test_large_logits_stay_finite(randn: Randn) -> None:
    q, k, v = (randn(1, 2, 70, 8, dtype=torch.float32) for _ in range(3))
    output = tiled_attention(q * 1e4, k * 1e4, v)
    grads = torch.autograd.grad(output.sum(), (q, k, v))
    assert all(x.isfinite().all() for x in (output, *grads))


@pytest.mark.usefixtures("either_tile")
@pytest.mark.parametrize("window", [None, 3])
def test_gradcheck(randn: Randn, window: int | None) -> None:
    q, k, v = randn(1, 4, 5, 3), randn(1, 2, 6, 3), randn(1, 2, 6, 2)
    assert torch.autograd.gradcheck(lambda *x: tiled_attention(*x, window=window), (q, k, v))


def test_the_output_has_the_dtype_of_the_queries(randn: Randn) -> None:
    q = randn(1, 2, 9, 4, dtype=torch.bfloat16)
    for window in (None, 3):
        assert attention(q, q, q, window=window).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("heads", "kv_heads", "keys", "window", "message"),
    [
        (3, 2, 5, None, "3 query, 2 key and 2 value heads; use H, "),
        (2, 2, 4, None, "Tk >= Tq"),
        (2, 2, 5, 0, "window is 0"),
    ],
)
def test_wrong_shapes_are_named(
    randn: Randn, heads: int, kv_heads: int, keys: int, window: int | None, message: str
) -> None:
    q, k = randn(1, heads, 5, 4), randn(1, kv_heads, keys, 4)
    with pytest.raises(UsageError, match=message):
        attention(q, k, k, window=window)
