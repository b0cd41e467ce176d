"""Packed documents in the softmax kernels and in all kernels together: none of them sees what came before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from trine.configs.errors import UsageError
from trine.kernels import reference
from trine.kernels.attention import attention
from trine.kernels.differential import differential_attention, differential_attention_v2
from trine.kernels.retention import fixed_decay_log, retention

Randn = Callable[..., Tensor]
Check = Callable[..., None]
Packed = Callable[[list[list[int]]], Tensor]

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
LENGTH = 257
PACKINGS = {
    "boundaries at the edges of tiles and chunks": [[64, 64, 129], [128, 128, 1]],
    "documents of one token": [[1, 1, 1, 1, 253], [150, 1, 1, 105]],
    "unlike sequences": [[257], [3, 60, 2, 63, 129]],
}


@pytest.fixture(params=PACKINGS.values(), ids=PACKINGS)
def documents(request: pytest.FixtureRequest) -> list[list[int]]:
    """Lengths of the documents in two sequences of 257 tokens."""
    lengths: list[list[int]] = request.param
    return lengths


@pytest.mark.usefixtures("either_tile")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "value_width"), [(None, 12), (None, 20), (1, 12), (20, 12), (129, 20)])
def test_attention_matches_the_reference(
    randn: Randn,
    assert_same: Check,
    packed: Packed,
    documents: list[list[int]],
    window: int | None,
    value_width: int,
    dtype: torch.dtype,
) -> None:
    starts = packed(documents)
    inputs = [randn(2, *size, dtype=dtype) for size in ((6, LENGTH, 12), (2, LENGTH, 12), (2, LENGTH, value_width))]
    assert_same(
        lambda *x: attention(*x, window=window, document_start=starts),
        lambda *x: reference.attention(*x, window, starts),
        inputs,
    )


@pytest.mark.usefixtures("either_tile")
@pytest.mark.parametrize("window", [None, 30, 90])
@pytest.mark.parametrize("queries", [1, 70, 129])
def test_fewer_queries_than_keys(
    randn: Randn, assert_same: Check, packed: Packed, documents: list[list[int]], queries: int, window: int | None
) -> None:
    starts = packed(documents)[:, -queries:]
    inputs = [randn(2, 4, queries, 12), randn(2, 2, LENGTH, 12), randn(2, 2, LENGTH, 12)]
    assert_same(
        lambda *x: attention(*x, window=window, document_start=starts),
        lambda *x: reference.attention(*x, window, starts),
        inputs,
    )


@pytest.mark.usefixtures("either_tile")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 2, 20, 129])
def test_differential_v1_matches_the_reference(
    randn: Randn,
    assert_same: Check,
    packed: Packed,
    documents: list[list[int]],
    window: int | None,
    dtype: torch.dtype,
) -> None:
    starts = packed(documents)
    sizes = ((8, LENGTH, 12), (4, LENGTH, 12), (2, LENGTH, 24))
    inputs = [randn(2, *size, dtype=dtype) for size in sizes] + [randn(dtype=dtype)]
    assert_same(
        lambda *x: differential_attention(*x, window=window, document_start=starts),
        lambda *x: reference.differential_attention(*x, window, starts),
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 2, 20, 129])
def test_differential_v2_matches_the_reference(
    randn: Randn,
    assert_same: Check,
    packed: Packed,
    documents: list[list[int]],
    window: int | None,
    dtype: torch.dtype,
) -> None:
    starts = packed(documents)
    sizes = ((8, LENGTH, 12), (2, LENGTH, 12), (2, LENGTH, 12), (4, LENGTH))
    assert_same(
        lambda q, k, v, lam: differential_attention_v2(q, k, v, lam.sigmoid(), window=window, document_start=starts),
        lambda q, k, v, lam: reference.differential_attention_v2(q, k, v, lam.sigmoid(), window, starts),
        [randn(2, *size, dtype=dtype) for size in sizes],
    )


def test_a_document_that_began_before_the_first_key_starts_at_or_below_zero(randn: Randn, packed: Packed) -> None:
    q, k, v = (randn(1, 2, 90, 8) for _ in range(3))
    starts = packed([[40, 50]])
    outputs = [attention(q, k, v, document_start=starts.where(starts > 0, first)) for first in (0, -1, -1000)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


class Kernel(NamedTuple):
    """A kernel as a function of (B, heads, T, ...) inputs of the given (heads, ...) sizes."""

    function: Callable[..., Tensor]
    sizes: list[tuple[int, ...]]
    leak: dict[torch.dtype, float] = dict.fromkeys([torch.float64, torch.float32], 0.0)
    """By how much earlier documents may change a later one."""


def retain(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, document_start: Tensor | None, **options: Any) -> Tensor:
    resets = None if document_start is None else document_start == torch.arange(q.shape[2])
    return retention(q, k, v, decay, resets=resets, **options)[0]


KERNELS = {
    "attention": Kernel(attention, [(4, 8), (2, 8), (2, 8)]),
    "window": Kernel(lambda *x, **options: attention(*x, window=30, **options), [(4, 8), (2, 8), (2, 12)]),
    "differential": Kernel(
        lambda *x, **options: differential_attention(*x, torch.tensor(0.3), **options), [(8, 8), (4, 8), (2, 16)]
    ),
    "differential V2": Kernel(differential_attention_v2, [(8, 8), (2, 8), (2, 8), (4,)]),
    "retention": Kernel(
        lambda q, k, v, **options: retain(q, k, v, fixed_decay_log(3).to(q), **options), [(3, 8), (3, 8), (3, 12)]
    ),
    "gated retention": Kernel(
        lambda q, k, v, gate, **options: retain(q, k, v, -gate.square() / 8, **options),
        [(3, 8), (3, 8), (3, 12), (3,)],
        # The running sums of the log-decays cross the boundaries, and with them their rounding.
        {torch.float64: 1e-12, torch.float32: 2e-4},
    ),
}


@pytest.fixture(params=KERNELS.values(), ids=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """Each kernel in turn."""
    chosen: Kernel = request.param
    return chosen


def make_inputs(kernel: Kernel, randn: Randn, dtype: torch.dtype) -> list[Tensor]:
    return [randn(2, heads, LENGTH, *width, dtype=dtype) for heads, *width in kernel.sizes]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_document_in_a_window_equals_the_document_alone(
    randn: Randn, assert_same: Check, packed: Packed, documents: list[list[int]], kernel: Kernel, backend: str
) -> None:
    def one_by_one(*inputs: Tensor) -> Tensor:
        rows = []
        for row, lengths in enumerate(documents):
            pieces = zip(*(x[row : row + 1].split(lengths, dim=2) for x in inputs), strict=True)
            alone = [kernel.function(*piece, document_start=None, backend=backend) for piece in pieces]
            rows.append(torch.cat(alone, dim=2))
        return torch.cat(rows)

    starts = packed(documents)
    assert_same(
        lambda *x: kernel.function(*x, document_start=starts, backend=backend),
        one_by_one,
        make_inputs(kernel, randn, torch.float64),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_leaks_from_earlier_documents(
    randn: Randn, packed: Packed, documents: list[list[int]], kernel: Kernel, dtype: torch.dtype
) -> None:
    starts = packed(documents)
    last = starts == starts[:, -1:]
    inputs, others = (make_inputs(kernel, randn, dtype) for _ in range(2))

    def of_last(x: Tensor) -> Tensor:
        return x.transpose(1, 2)[last]

    # (B, T) as (B, 1, T) or (B, 1, T, 1).
    kept = [last.view(2, 1, LENGTH, *(1 for _ in x.shape[3:])) for x in inputs]
    changed = [torch.where(keep, x, y) for keep, x, y in zip(kept, inputs, others, strict=True)]
    output = of_last(kernel.function(*inputs, document_start=starts))
    other = of_last(kernel.function(*changed, document_start=starts))
    torch.testing.assert_close(other, output, rtol=0, atol=kernel.leak[dtype])
    unmasked, changed_unmasked = (of_last(kernel.function(*x, document_start=None)) for x in (inputs, changed))
    assert (unmasked - changed_unmasked).abs().max() > 0.1, "the change is too small to tell a leak"
    for grad in torch.autograd.grad(output.square().sum(), inputs):
        assert torch.count_nonzero(grad.transpose(1, 2)[~last]) == 0
        assert torch.count_nonzero(of_last(grad)) > 0


@pytest.mark.parametrize("function", [attention, differential_attention, differential_attention_v2])
@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 6), torch.int64, r"document_start torch.int64 of shape \(1, 6\) for q \(1, 4, 5, 8\); use torch.int64"),
        ((5,), torch.int64, r"of shape \(5,\)"),
        ((1, 5), torch.bool, "document_start torch.bool"),
    ],
)
def test_wrong_starts_are_named(
    randn: Randn, function: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype, message: str
) -> None:
    q, k, v = randn(1, 4, 5, 8), randn(1, 2, 6, 8), randn(1, 2, 6, 8)
    lam = {differential_attention: [torch.tensor(0.3)], differential_attention_v2: [randn(1, 2, 5)]}
    v = v[:, :1] if function is differential_attention else v
    with pytest.raises(UsageError, match=message):
        function(q, k, v, *lam.get(function, []), document_start=torch.zeros(shape, dtype=dtype))
