"""Retention that forgets where documents start, and the state that a chunk hands on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.configs.errors import UsageError
from trine.kernels import reference
from trine.kernels.retention import chunk_state, fixed_decay_log, retention

Randn = Callable[..., Tensor]
Check = Callable[..., None]
Packed = Callable[[list[list[int]]], Tensor]
Function = Callable[..., tuple[Tensor, Tensor]]
Inputs = Callable[..., list[Tensor]]

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
LENGTH = 130
PACKINGS = {
    "boundaries at the edges of chunks": [[64, 64, 2], [48, 16, 66]],
    "several in a chunk, of one token": [[1] * 9 + [121], [70, 1, 1, 5, 3, 50]],
    "unlike sequences": [[130], [127, 1, 1, 1]],
}


@pytest.fixture(params=PACKINGS.values(), ids=PACKINGS)
def resets(request: pytest.FixtureRequest, packed: Packed) -> Tensor:
    """(2, 130) bool: the first tokens of the documents, but not that of the second sequence.

    It continues a document from the initial state.
    """
    firsts = packed(request.param) == torch.arange(LENGTH)
    firsts[1, 0] = False
    return firsts


@pytest.fixture(params=["fixed", "per token"])
def make_inputs(request: pytest.FixtureRequest, randn: Randn) -> Inputs:
    """q, k, v, log-decay and initial state of 3 heads; the decays are never narrower than fp32."""

    def make(dtype: torch.dtype = torch.float64, length: int = LENGTH) -> list[Tensor]:
        q, k = (randn(2, 3, length, 12, dtype=dtype) for _ in range(2))
        v, state = randn(2, 3, length, 20, dtype=dtype), randn(2, 3, 12, 20)
        wide = torch.promote_types(dtype, torch.float32)
        if request.param == "fixed":
            return [q, k, v, fixed_decay_log(3).to(wide), state]
        gated = torch.nn.functional.logsigmoid(randn(2, 3, length)) / 4
        return [q, k, v, gated.detach().to(wide).requires_grad_(), state]

    return make


def with_state(function: Function, **options: Any) -> Function:
    return lambda q, k, v, log_decay, state: function(q, k, v, log_decay, initial_state=state, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [5, 16, 64, 1000])
def test_matches_the_parallel_form(
    make_inputs: Inputs, assert_same: Check, resets: Tensor, chunk_size: int, dtype: torch.dtype
) -> None:
    assert_same(
        with_state(retention, resets=resets, chunk_size=chunk_size),
        with_state(reference.retention, resets=resets),
        make_inputs(dtype),
    )


def test_the_recurrent_form_matches_the_parallel_form(
    make_inputs: Inputs, assert_same: Check, resets: Tensor
) -> None:
    assert_same(
        with_state(reference.retention_recurrent, resets=resets),
        with_state(reference.retention, resets=resets),
        make_inputs(),
    )


def test_no_reset_equals_none(make_inputs: Inputs) -> None:
    q, k, v, log_decay, state = make_inputs()
    never = torch.zeros(2, LENGTH, dtype=torch.bool)
    results = [retention(q, k, v, log_decay, initial_state=state, resets=r, chunk_size=48) for r in (never, None)]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_a_reset_at_the_first_token_forgets_the_initial_state(make_inputs: Inputs) -> None:
    q, k, v, log_decay, state = make_inputs()
    first = torch.zeros(2, LENGTH, dtype=torch.bool)
    first[:, 0] = True
    results = retention(q, k, v, log_decay, initial_state=state, resets=first, chunk_size=48)
    for result, expected in zip(results, retention(q, k, v, log_decay, chunk_size=48), strict=True):
        assert torch.equal(result, expected)
    (grad,) = torch.autograd.grad(sum(result.sum() for result in results), state)
    assert torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("chunk_size", [16, 64])
def test_the_decay_at_a_reset_takes_no_gradient(randn: Randn, resets: Tensor, chunk_size: int) -> None:
    q, k, v, gate = *(randn(2, 3, LENGTH, 8) for _ in range(3)), randn(2, 3, LENGTH)
    output, state = retention(q, k, v, -gate.square(), resets=resets, chunk_size=chunk_size)
    (grad,) = torch.autograd.grad(output.square().sum() + state.sum(), gate)
    assert torch.count_nonzero(grad.transpose(1, 2)[resets]) == 0


def test_strong_decays_stay_finite(randn: Randn, assert_same: Check, resets: Tensor) -> None:
    q, k, v = (randn(2, 1, 70, 4, dtype=torch.float32) for _ in range(3))
    log_decay = torch.full((2, 1, 70), -200.0).requires_grad_()
    assert_same(
        lambda *x: retention(*x, resets=resets[:, :70]),
        lambda *x: reference.retention(*x, resets=resets[:, :70]),
        [q, k, v, log_decay],
    )


@pytest.mark.parametrize("chunk_size", [3, 7])
def test_gradcheck(randn: Randn, chunk_size: int) -> None:
    q, k, v, state = randn(2, 1, 7, 3), randn(2, 1, 7, 3), randn(2, 1, 7, 2), randn(2, 1, 3, 2)
    log_decay = -torch.rand(2, 1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    resets = torch.tensor([[0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    function = with_state(retention, resets=resets, chunk_size=chunk_size)
    assert torch.autograd.gradcheck(function, (q, k, v, log_decay.requires_grad_(), state))


def test_transposed_resets_need_no_copy_by_the_caller(make_inputs: Inputs, resets: Tensor) -> None:
    *qkv, state = make_inputs()
    results = [
        retention(*qkv, initial_state=state, resets=r, chunk_size=16) for r in (resets, resets.T.contiguous().T)
    ]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


class TestChunkState:
    @staticmethod
    def fast(k: Tensor, v: Tensor, log_decay: Tensor, resets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """chunk_state; 0 * v makes the gradient of a fixed decay across the chunk zero rather than absent."""
        state, decay = chunk_state(k, v, log_decay, resets)
        return state, decay + 0 * v.sum()

    @staticmethod
    def naive(k: Tensor, v: Tensor, log_decay: Tensor, resets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The recurrence from an empty start, and what it makes of a state of ones where values are zero."""
        _, state = reference.retention_recurrent(k, k, v, log_decay, resets=resets)
        ones = torch.ones_like(state)
        _, decayed = reference.retention_recurrent(k, k, 0 * v, log_decay, ones, resets)
        return state, decayed[:, :, 0, 0]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("length", [1, 7, 63])
    def test_matches_the_recurrence(
        self, make_inputs: Inputs, assert_same: Check, length: int, dtype: torch.dtype
    ) -> None:
        _, k, v, log_decay, _ = make_inputs(dtype, length)
        assert_same(self.fast, self.naive, [k, v, log_decay])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("firsts", [[0], [62], [5, 6, 40], []])
    def test_matches_the_recurrence_with_resets(
        self, make_inputs: Inputs, assert_same: Check, firsts: list[int], dtype: torch.dtype
    ) -> None:
        _, k, v, log_decay, _ = make_inputs(dtype, 63)
        resets = torch.zeros(2, 63, dtype=torch.bool)
        resets[1, firsts] = True
        assert_same(lambda *x: self.fast(*x, resets), lambda *x: self.naive(*x, resets), [k, v, log_decay])

    def test_it_is_what_retention_does_to_its_state(self, make_inputs: Inputs, resets: Tensor) -> None:
        q, k, v, log_decay, state = make_inputs()
        left, decay = chunk_state(k, v, log_decay, resets)
        final = retention(q, k, v, log_decay, initial_state=state, resets=resets)[1]
        torch.testing.assert_close(decay[..., None, None] * state + left, final, rtol=0, atol=1e-12)

    def test_nothing_leaks_from_before_the_last_reset(self, randn: Randn, resets: Tensor) -> None:
        k, v, gate = randn(2, 3, LENGTH, 8), randn(2, 3, LENGTH, 12), randn(2, 3, LENGTH)
        before = resets.flip(1).cumsum(1).flip(1) > resets
        state, decay = chunk_state(k, v, -gate.square(), resets)
        for grad in torch.autograd.grad(state.square().sum() + decay.sum(), (k, v, gate)):
            assert torch.count_nonzero(grad.transpose(1, 2)[before]) == 0

    def test_dtypes(self, randn: Randn) -> None:
        k, v = (randn(1, 2, 9, 4, dtype=torch.bfloat16) for _ in range(2))
        assert {x.dtype for x in chunk_state(k, v, fixed_decay_log(2))} == {torch.float32}

    def test_strong_decays_leave_no_subnormal_numbers(self, randn: Randn) -> None:
        """e^-1 per token passes the range of fp32 after 87 tokens, and its subnormal range after 103."""
        k, v = torch.ones(1, 1, 200, 4), torch.eye(200)[None, None]
        state, _ = chunk_state(k, v, torch.full((1, 1, 200), -1.0))
        assert ((state == 0) | (state > torch.finfo(torch.float32).tiny)).all()

    def test_gradcheck(self, randn: Randn) -> None:
        k, v, decay = randn(2, 2, 5, 3), randn(2, 2, 5, 2), randn(2, 2, 5)
        resets = torch.tensor([[False] * 5, [False, False, True, False, False]])
        assert torch.autograd.gradcheck(lambda k, v, x: chunk_state(k, v, -x.square(), resets), (k, v, decay))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 6), torch.bool, r"resets torch.bool of shape \(1, 6\) for v \(1, 2, 5, 4\); use torch.bool"),
        ((5,), torch.bool, r"of shape \(5,\)"),
        ((1, 5), torch.int64, "resets torch.int64"),
    ],
)
def test_wrong_resets_are_named(randn: Randn, shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    q, resets = randn(1, 2, 5, 4), torch.zeros(shape, dtype=dtype)
    with pytest.raises(UsageError, match=message):
        retention(q, q, q, fixed_decay_log(2), resets=resets)
    with pytest.raises(UsageError, match=message):
        chunk_state(q, q, fixed_decay_log(2), resets)


def test_wrong_shapes_of_a_chunk_are_named(randn: Randn) -> None:
    with pytest.raises(UsageError, match=r"k \(1, 2, 5, 4\), v \(1, 2, 6, 4\); use .B, H, T, dk."):
        chunk_state(randn(1, 2, 5, 4), randn(1, 2, 6, 4), fixed_decay_log(2))
    with pytest.raises(UsageError, match=r"log_decay of shape \(3,\)"):
        chunk_state(randn(1, 2, 5, 4), randn(1, 2, 5, 4), fixed_decay_log(3))
