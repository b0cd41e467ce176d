"""Rotary embedding, RMSNorm and SwiGLU."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trine.kernels.activation import swiglu
from trine.kernels.norm import rms_norm
from trine.kernels.rotary import apply_rotary, rotary_frequencies, rotary_tables

Randn = Callable[..., Tensor]
Check = Callable[..., None]


class TestRotary:
    def test_frequencies(self) -> None:
        standard = rotary_frequencies(8, 1e4, "standard")
        torch.testing.assert_close(standard, torch.tensor([1.0, 1e-1, 1e-2, 1e-3]), rtol=1e-6, atol=0)
        linspace = rotary_frequencies(8, 1e3, "linspace")
        torch.testing.assert_close(linspace, torch.tensor([1.0, 1e-1, 1e-2, 1e-3]), rtol=1e-6, atol=0)
        assert standard.dtype == linspace.dtype == torch.float32

    def test_the_two_spacings_differ_where_it_hurts(self) -> None:
        standard, linspace = (rotary_frequencies(128, 1e4, s)[-1] for s in ("standard", "linspace"))
        assert float(linspace) == pytest.approx(1e-4, rel=1e-6)
        assert float(standard / linspace) == pytest.approx(1.155, abs=1e-3)

    def test_a_head_of_one_pair(self) -> None:
        for spacing in ("standard", "linspace"):
            assert rotary_frequencies(2, 1e4, spacing).tolist() == [1.0]

    def test_angles_of_late_positions(self) -> None:
        position, frequency = 1_000_003, rotary_frequencies(64, 1e4, "standard")
        cos, sin = rotary_tables(torch.tensor([position]), frequency)
        for i, f in enumerate(frequency.tolist()):
            assert float(cos[0, i]) == pytest.approx(math.cos(position * f), abs=1e-6)
            assert float(sin[0, i]) == pytest.approx(math.sin(position * f), abs=1e-6)

    def test_pairs_are_interleaved(self) -> None:
        cos, sin = rotary_tables(torch.tensor([3]), rotary_frequencies(4, 1e4, "standard"))
        rotated = apply_rotary(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), cos, sin)
        expected = torch.tensor([[math.cos(3), math.sin(3), -math.sin(0.03), math.cos(0.03)]])
        torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-6)

    def test_scores_depend_on_the_distance_only(self, randn: Randn) -> None:
        q, k = randn(1, 1, 1, 16), randn(1, 1, 1, 16)
        frequencies = rotary_frequencies(16, 1e4, "linspace")

        def score(n: int, m: int) -> Tensor:
            rotated_q, rotated_k = (
                apply_rotary(x, *rotary_tables(torch.tensor([p]), frequencies)) for x, p in ((q, n), (k, m))
            )
            return (rotated_q * rotated_k).sum()

        # fp32 tables limit the agreement.
        torch.testing.assert_close(score(105, 100), score(5, 0), rtol=0, atol=1e-5)

    def test_gradcheck_and_permuted_inputs(self, randn: Randn) -> None:
        cos, sin = rotary_tables(torch.arange(5), rotary_frequencies(6, 1e4, "standard"))
        x = randn(5, 2, 3, 6)
        assert torch.autograd.gradcheck(lambda x: apply_rotary(x.permute(1, 2, 0, 3), cos, sin), (x,))

    @pytest.mark.parametrize("first", [0, 1])
    @pytest.mark.parametrize("width", [7, 8])
    def test_slices_with_odd_strides_or_offsets(self, randn: Randn, width: int, first: int) -> None:
        cos, sin = rotary_tables(torch.arange(5), rotary_frequencies(6, 1e4, "standard"))
        x = randn(5, width)[:, first : first + 6]
        contiguous = randn(1 + x.numel())[1:].view(5, 6)
        for view in (x, x.mT.contiguous().mT, contiguous):
            expected = apply_rotary(view.clone(memory_format=torch.contiguous_format), cos, sin)
            torch.testing.assert_close(apply_rotary(view, cos, sin), expected, rtol=0, atol=1e-12)

    def test_bf16_is_rotated_in_fp32_and_rounded_once(self, randn: Randn) -> None:
        cos, sin = rotary_tables(torch.arange(50), rotary_frequencies(16, 1e4, "standard"))
        x = randn(2, 3, 50, 16, dtype=torch.bfloat16)
        rotated = apply_rotary(x, cos, sin)
        assert torch.equal(rotated, apply_rotary(x.float(), cos, sin).to(torch.bfloat16))


class TestNorm:
    @pytest.mark.parametrize("weighted", [True, False])
    def test_formula_and_gradient(self, randn: Randn, assert_same: Check, weighted: bool) -> None:
        def formula(x: Tensor, weight: Tensor | None = None) -> Tensor:
            normalised = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
            return normalised if weight is None else normalised * weight

        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            inputs = [randn(4, 7, 24, dtype=dtype), *([randn(24, dtype=dtype)] if weighted else [])]
            assert_same(lambda x, weight=None: rms_norm(x, weight, 1e-5), formula, inputs)

    def test_a_wider_weight_does_not_promote(self, randn: Randn) -> None:
        x, weight = randn(4, 24, dtype=torch.bfloat16), randn(24, dtype=torch.float32)
        output = rms_norm(x, weight, 1e-5)
        grads = torch.autograd.grad(output.float().sum(), (x, weight))
        assert [t.dtype for t in (output, *grads)] == [torch.bfloat16, torch.bfloat16, torch.float32]
        expected = rms_norm(x.double(), weight.double(), 1e-5)
        torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=0)

    def test_statistics_do_not_overflow(self) -> None:
        """300^2 is beyond fp16, whose largest number is 65504."""
        output = rms_norm(torch.full((2, 8), 300.0, dtype=torch.float16), None, 1e-5)
        assert torch.equal(output, torch.ones(2, 8, dtype=torch.float16))

    def test_zeros_stay_zeros(self) -> None:
        x = torch.zeros(2, 8, requires_grad=True)
        output = rms_norm(x, None, 1e-6)
        (grad,) = torch.autograd.grad(output.sum(), x)
        assert torch.equal(output, torch.zeros(2, 8))
        assert grad.isfinite().all()


class TestSwiglu:
    def test_formula_and_gradient(self, randn: Randn, assert_same: Check) -> None:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            inputs = [randn(3, 50, dtype=dtype), randn(3, 50, dtype=dtype)]
            assert_same(swiglu, lambda a, b: a / (1 + (-a).exp()) * b, inputs)

    def test_silu_of_bf16_is_fp32_rounded_once(self, randn: Randn) -> None:
        a, b = (randn(1000, dtype=torch.bfloat16) for _ in range(2))
        silu = torch.nn.functional.silu(a.float()).to(torch.bfloat16)
        assert torch.equal(swiglu(a, b), silu * b)
