"""Fused retention against the recurrent reference, in Triton's interpreter and on a GPU.

In the interpreter tiles are small, so that few tokens and widths fill several of them; on a GPU they are those of the
table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from trine.kernels import reference
from trine.kernels.chunkwise import chunkwise_retention
from trine.kernels.fused.retention import fused_retention, unsupported
from trine.kernels.fused.tiles import Tiles, tiles_override
from trine.kernels.retention import fixed_decay_log

Randn = Callable[..., Tensor]
Check = Callable[..., None]

HEADS = 2


@pytest.fixture(autouse=True)
def _small_tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    if "device" not in request.fixturenames or request.getfixturevalue("device") == "cuda":
        yield
        return
    with tiles_override({name: Tiles(16, 16, 4, 1) for name in ("retention_states", "retention_tokens")}):
        yield


class Case(NamedTuple):
    """Sizes of one retention of two heads, of two sequences where documents begin: tokens, widths (dk, dv), and where documents begin."""

    tokens: int
    widths: tuple[int, int] = (16, 24)
    gated: bool = False
    resets: tuple[int, ...] = ()
    chunk: int = 32

    def inputs(self, randn: Randn, device: str, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v, log-decay and initial state; q, k and v are views of (T, B, H, d)."""
        dk, dv = self.widths
        batch = 2 if self.resets else 1
        q, k, v = (randn(self.tokens, batch, HEADS, width, dtype=dtype).detach() for width in (dk, dk, dv))
        decay = fixed_decay_log(HEADS)
        if self.gated:
            decay = torch.nn.functional.logsigmoid(randn(batch, HEADS, self.tokens, dtype=torch.float32).detach()) / 4
        state = randn(batch, HEADS, dk, dv, dtype=torch.float32).detach()
        views = [x.to(device).permute(1, 2, 0, 3).requires_grad_() for x in (q, k, v)]
        return [*views, decay.to(device).requires_grad_(self.gated), state.to(device).requires_grad_()]

    def starts(self, device: str) -> Tensor | None:
        """Resets (B, T): the second sequence has only the first of them."""
        if not self.resets:
            return None
        starts = torch.zeros(2, self.tokens, dtype=torch.bool)
        starts[0, list(self.resets)] = True
        starts[1, self.resets[0]] = True
        return starts.to(device)


CASES = {
    "one token": Case(1),
    "part of a tile": Case(7),
    "ragged chunks": Case(51),
    "whole chunks": Case(64),
    "gated, ragged chunks": Case(51, gated=True),
    "keys wider than values": Case(21, (40, 8)),
    "several blocks of both widths": Case(21, (24, 40), gated=True),
    "a document from the first token": Case(51, resets=(0,)),
    "documents at the edges of chunks": Case(51, resets=(16, 32), gated=True),
    "documents inside chunks": Case(51, resets=(3, 5, 40, 50), gated=True),
    "documents, fixed decay": Case(51, resets=(5, 33, 34)),
}
LARGE = {
    "RetNet's widths": Case(555, (256, 512), chunk=256),
    "square heads": Case(1111, (128, 128), gated=True, chunk=256),
    "narrow heads": Case(1111, (64, 128), resets=(3, 300, 1000), gated=True, chunk=128),
}


def check(case: Case, device: str, dtype: torch.dtype, randn: Randn, assert_same: Check) -> None:
    def fused(*x: Tensor) -> tuple[Tensor, Tensor]:
        return fused_retention(*x, case.starts(device), chunk_size=case.chunk)

    def exact(*x: Tensor) -> tuple[Tensor, Tensor]:
        return reference.retention_recurrent(*x, case.starts(device))

    assert_same(fused, exact, case.inputs(randn, device, dtype))


@pytest.mark.parametrize("name", CASES)
def test_fp32(name: str, device: str, randn: Randn, assert_same: Check) -> None:
    check(CASES[name], device, torch.float32, randn, assert_same)


@pytest.mark.parametrize("name", ["ragged chunks", "documents inside chunks"])
def test_bf16(name: str, device: str, randn: Randn, assert_same: Check) -> None:
    check(CASES[name], device, torch.bfloat16, randn, assert_same)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_large(name: str, randn: Randn, assert_same: Check) -> None:
    check(LARGE[name], "cuda", torch.bfloat16, randn, assert_same)


def test_equals_the_torch_path(device: str, randn: Randn) -> None:
    case = CASES["documents inside chunks"]
    inputs, starts = case.inputs(randn, device, torch.float32), case.starts(device)
    results = [
        function(*inputs, starts, chunk_size=16) if function is fused_retention else function(*inputs, 16, starts)
        for function in (fused_retention, chunkwise_retention)
    ]
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)  # sums of at most 51 products in fp32


@pytest.mark.parametrize("gated", [False, True])
def test_strong_decay_forgets_without_nan(gated: bool, device: str, randn: Randn) -> None:
    """Each token keeps itself alone: the output is (q . k) v, and no gradient reaches the decays."""
    q, k, v, decay, state = Case(40, gated=gated).inputs(randn, device, torch.float32)
    decay = torch.full_like(decay, -30.0).requires_grad_(gated)
    output, _ = fused_retention(q, k, v, decay, state)
    assert torch.allclose(output, (q * k).sum(-1, keepdim=True) * v, rtol=1e-5, atol=1e-5)
    trained = [q, k, v, state, *([decay] if gated else [])]
    grads = torch.autograd.grad(output, trained, torch.ones_like(output))
    assert all(grad.isfinite().all() for grad in grads)
    if gated:
        assert grads[-1].abs().max() < 1e-3  # what remains of q . dq - k . dk, which cancel, up to 40 roundings


def test_bits_repeat(device: str, randn: Randn) -> None:
    case = CASES["gated, ragged chunks"]
    inputs = case.inputs(randn, device, torch.float32)

    def run() -> list[Tensor]:
        output, state = fused_retention(*inputs, chunk_size=case.chunk)
        grads = torch.autograd.grad([output, state], inputs, [torch.ones_like(output), torch.ones_like(state)])
        return [output, state, *grads]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_outputs_lie_in_memory_as_the_values_do(device: str, randn: Randn) -> None:
    """Merging the heads of the output is then a view."""
    inputs = CASES["ragged chunks"].inputs(randn, device, torch.float32)
    output, _ = fused_retention(*inputs)
    assert output.permute(2, 0, 1, 3).is_contiguous()


@pytest.mark.parametrize(
    ("widths", "dtypes", "reason"),
    [
        ((16, 16), (torch.float64,) * 3, "takes bf16, fp16 and fp32, not torch.float64"),
        ((16, 16), (torch.float32, torch.float32, torch.bfloat16), "takes one dtype"),
        ((12, 16), (torch.float32,) * 3, "multiples of 8 up to 512, not dk 12"),
        ((16, 520), (torch.float32,) * 3, "multiples of 8 up to 512, not dv 520"),
        ((16, 16), (torch.float32,) * 3, None),
    ],
)
def test_what_it_does_not_take(
    widths: tuple[int, int], dtypes: tuple[torch.dtype, ...], reason: str | None
) -> None:
    q, k, v = (torch.empty(1, 2, 3, w, dtype=t) for w, t in zip((widths[0], *widths), dtypes, strict=True))
    said = unsupported(q, k, v)
    assert said is None if reason is None else reason in said


def test_an_empty_sequence_is_not_taken() -> None:
    x = torch.empty(1, 2, 0, 16)
    assert "at least one token" in (unsupported(x, x, x) or "")
