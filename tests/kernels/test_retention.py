"""Chunkwise retention against the parallel form, the recurrent form against both, and how states compose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trine.configs.errors import UsageError
from trine.kernels import reference
from trine.kernels.retention import fixed_decay_log, retention

Randn = Callable[..., Tensor]
Check = Callable[..., None]
Function = Callable[..., tuple[Tensor, Tensor]]
Inputs = Callable[..., list[Tensor]]
Schedule = Literal["default", "experiments"]

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
EXACT = {"rtol": 0, "atol": 1e-11}


@pytest.fixture
def make_inputs(randn: Randn) -> Inputs:
    """q, k, v, log-decay and initial state of 3 heads; the decays are never narrower than fp32."""

    def make(length: int, decay: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        q, k = (randn(2, 3, length, 12, dtype=dtype) for _ in range(2))
        v, state = randn(2, 3, length, 20, dtype=dtype), randn(2, 3, 12, 20)
        wide = torch.promote_types(dtype, torch.float32)
        if decay == "fixed":
            log_decay = fixed_decay_log(3).to(wide)
        else:
            log_decay = (
                (torch.nn.functional.logsigmoid(randn(2, 3, length)) / 4).detach().to(wide).requires_grad_()
            )
        return [q, k, v, log_decay, state]

    return make


def with_state(function: Function, **options: Any) -> Function:
    return lambda q, k, v, log_decay, state: function(q, k, v, log_decay, initial_state=state, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", ["fixed", "per token"])
@pytest.mark.parametrize("length", [1, 7, 63, 130, 257])
def test_matches_the_parallel_form(
    make_inputs: Inputs, assert_same: Check, length: int, decay: str, dtype: torch.dtype
) -> None:
    inputs = make_inputs(length, decay, dtype)
    assert_same(with_state(retention, chunk_size=64), with_state(reference.retention), inputs)


@pytest.mark.parametrize("decay", ["fixed", "per token"])
def test_the_recurrent_form_matches_the_parallel_form(
    make_inputs: Inputs, assert_same: Check, decay: str
) -> None:
    inputs = make_inputs(40, decay)
    assert_same(with_state(reference.retention_recurrent), with_state(reference.retention), inputs)


@pytest.mark.parametrize("decay", ["fixed", "per token"])
@pytest.mark.parametrize("chunk_size", [1, 5, 16, 48, 96, 1000])
def test_the_chunk_size_does_not_matter(
    make_inputs: Inputs, assert_same: Check, chunk_size: int, decay: str
) -> None:
    inputs = make_inputs(96, decay)
    assert_same(with_state(retention, chunk_size=chunk_size), with_state(reference.retention), inputs)


@pytest.mark.parametrize("decay", ["fixed", "per token"])
def test_the_state_is_zero_by_default(make_inputs: Inputs, decay: str) -> None:
    q, k, v, log_decay, state = make_inputs(50, decay)
    given_zero = retention(q, k, v, log_decay, initial_state=torch.zeros_like(state), chunk_size=16)
    for default, explicit in zip(retention(q, k, v, log_decay, chunk_size=16), given_zero, strict=True):
        assert torch.equal(default, explicit)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data(), length=st.integers(2, 40), chunk_size=st.integers(1, 45), fixed=st.booleans())
def test_a_sequence_cut_anywhere_equals_the_whole(
    data: st.DataObject, length: int, chunk_size: int, fixed: bool
) -> None:
    cut = data.draw(st.integers(1, length - 1), label="cut")
    torch.manual_seed(length)
    q, k, v, state = (
        torch.randn(*s, dtype=torch.float64)
        for s in ((1, 2, length, 4),) * 2 + ((1, 2, length, 3), (1, 2, 4, 3))
    )
    log_decay = -torch.rand((2,) if fixed else (1, 2, length), dtype=torch.float64)
    whole = retention(q, k, v, log_decay, initial_state=state, chunk_size=chunk_size)
    outputs = []
    for part in (slice(0, cut), slice(cut, length)):
        decay = log_decay if fixed else log_decay[..., part]
        output, state = retention(
            q[:, :, part], k[:, :, part], v[:, :, part], decay, initial_state=state, chunk_size=chunk_size
        )
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=2), whole[0], **EXACT)
    torch.testing.assert_close(state, whole[1], **EXACT)


@pytest.mark.parametrize("decay", ["fixed", "per token"])
def test_gradients_cross_a_cut_through_the_state(make_inputs: Inputs, assert_same: Check, decay: str) -> None:
    def in_two_parts(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        outputs = []
        for part in (slice(0, 37), slice(37, None)):
            tensors = [x[:, :, part] for x in (q, k, v)]
            decays = log_decay if log_decay.dim() == 1 else log_decay[..., part]
            output, state = retention(*tensors, decays, initial_state=state, chunk_size=16)
            outputs.append(output)
        return torch.cat(outputs, dim=2), state

    assert_same(in_two_parts, with_state(reference.retention), make_inputs(80, decay))


@pytest.mark.parametrize("used", [0, 1], ids=["output only", "final state only"])
def test_gradients_through_one_result_alone(make_inputs: Inputs, assert_same: Check, used: int) -> None:
    inputs = make_inputs(50, "per token")
    # The final state does not depend on q; 0 * q makes its gradient zero rather than absent.
    fast, naive = with_state(retention, chunk_size=16), with_state(reference.retention)
    assert_same(
        lambda q, *x: fast(q, *x)[used] + 0 * q.sum(), lambda q, *x: naive(q, *x)[used] + 0 * q.sum(), inputs
    )


@pytest.mark.parametrize("decay", ["fixed", "per token"])
def test_gradcheck(randn: Randn, decay: str) -> None:
    q, k, v, state = randn(1, 2, 7, 3), randn(1, 2, 7, 3), randn(1, 2, 7, 2), randn(1, 2, 3, 2)
    per_token = -torch.rand(1, 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    log_decay = fixed_decay_log(2).double() if decay == "fixed" else per_token.requires_grad_()
    function = with_state(retention, chunk_size=3)
    assert torch.autograd.gradcheck(function, (q, k, v, log_decay, state))


def test_permuted_inputs_need_no_copy_by_the_caller(randn: Randn, assert_same: Check) -> None:
    q, k, v = (randn(50, 2, 3, 8) for _ in range(3))

    def permuted(function: Function) -> Function:
        return lambda *x: function(*(y.permute(1, 2, 0, 3) for y in x), fixed_decay_log(3))

    assert_same(permuted(retention), permuted(reference.retention), [q, k, v])


def test_strong_decays_stay_finite(randn: Randn, assert_same: Check) -> None:
    """A decay of e^-200 per token would overflow in any form that divides by it."""
    q, k, v = (randn(1, 2, 70, 4, dtype=torch.float32) for _ in range(3))
    log_decay = torch.full((1, 2, 70), -200.0).requires_grad_()
    assert_same(retention, reference.retention, [q, k, v, log_decay])


def test_dtypes(randn: Randn) -> None:
    q, k, v = (randn(1, 2, 9, 4, dtype=torch.bfloat16) for _ in range(3))
    for backend in ("torch", "reference"):
        output, state = retention(q, k, v, fixed_decay_log(2), backend=backend)
        assert (output.dtype, state.dtype) == (torch.bfloat16, torch.float32)


class TestFixedDecay:
    def test_default_schedule(self) -> None:
        expected = torch.tensor([1 - 2.0**-5, 1 - 2.0**-6, 1 - 2.0**-7], dtype=torch.float64).log()
        torch.testing.assert_close(fixed_decay_log(3).double(), expected, rtol=1e-7, atol=0)

    def test_schedule_of_the_experiments(self) -> None:
        gamma = fixed_decay_log(8, schedule="experiments").double().exp()
        torch.testing.assert_close(
            (1 - gamma[[0, -1]]), torch.tensor([1 / 32, 1 / 512]).double(), rtol=1e-6, atol=0
        )
        ratios = (1 - gamma[1:]) / (1 - gamma[:-1])
        torch.testing.assert_close(ratios, ratios[:1].expand(7), rtol=1e-4, atol=0)

    def test_every_head_decays(self) -> None:
        """1 - 2^(-5-h) is 1 in fp32 from h = 20 on; the logarithm must not be 0."""
        decays = fixed_decay_log(40)
        assert decays.dtype == torch.float32
        assert (decays < 0).all()
        assert (decays.diff() > 0).all()

    @pytest.mark.parametrize("schedule", ["default", "experiments"])
    def test_shards_are_slices_of_the_whole(self, schedule: Schedule) -> None:
        shards = [fixed_decay_log(4, first=first, total=12, schedule=schedule) for first in (0, 4, 8)]
        assert torch.equal(torch.cat(shards), fixed_decay_log(12, schedule=schedule))

    def test_heads_outside_the_model_are_refused(self) -> None:
        with pytest.raises(UsageError, match="heads 4 to 7 are not among 6"):
            fixed_decay_log(4, first=4, total=6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 2, 5, 3)}, "use .B, H, T, dk. twice"),
        ({"v": (1, 2, 4, 6)}, "use .B, H, T, dk. twice"),
        ({"log_decay": (3,)}, r"log_decay of shape \(3,\)"),
        ({"log_decay": (2,)}, "fixed log_decay that requires a gradient"),
        ({"initial_state": (1, 2, 6, 4)}, r"state of shape \(1, 2, 6, 4\)"),
    ],
)
def test_wrong_shapes_are_named(randn: Randn, change: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {"q": (1, 2, 5, 4), "k": (1, 2, 5, 4), "v": (1, 2, 5, 6), "log_decay": (1, 2, 5)} | change
    with pytest.raises(UsageError, match=message):
        retention(**{name: randn(*shape) for name, shape in shapes.items()})


def test_a_chunk_size_of_zero_is_refused(randn: Randn) -> None:
    q = randn(1, 2, 5, 4)
    with pytest.raises(UsageError, match="chunk_size is 0"):
        retention(q, q, q, fixed_decay_log(2), chunk_size=0)
