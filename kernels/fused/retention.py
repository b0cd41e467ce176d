"""Launches the kernels of chunkwise retention; the mathematics is that of ``kernels.chunkwise``.

Two kernels make the forward and the backward pass: ``scan_states`` walks the states over the chunks, in order or
backwards, and ``mix_tokens`` gives the tokens of each chunk what they get from each other and from a state. Nothing of
size C x C or (T, dk, dv) exists in memory, and no result depends on the order in which programs run.

A state is carried in fp32 and stored once per chunk in the dtype of v. Its readers multiply it by operands of that
dtype, so that more digits would be rounded away again; half of the bytes matter, because with chunks of 256 tokens the
kernels are bound by memory. The gradient of the log-decays needs <U, S_out>, which the backwards walk sums while it
holds U in fp32: the rounding of S_out there is one of many independent ones. Values of fp16 overflow above 65504, in
states as elsewhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..decay_gradient import log_decay_gradient
from .jit.retention_states import scan_states
from .jit.retention_tokens import mix_tokens
from .launching import device_of
from .tiles import Tiles, padded, tiles

CHUNK = 256
"""Tokens per stored state: below it the traffic of states dominates, above it the products of pairs of tokens."""

WIDEST = 512
"""The largest dk and dv."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why these kernels do not take q and k (B, H, T, dk) with v (B, H, T, dv), or None where they do."""
    if q.dtype not in DTYPES:
        return f"the fused retention takes bf16, fp16 and fp32, not {q.dtype}"
    if not q.dtype == k.dtype == v.dtype:
        return f"the fused retention takes one dtype, not q {q.dtype}, k {k.dtype} and v {v.dtype}"
    for name, width in (("dk", q.shape[-1]), ("dv", v.shape[-1])):
        if width % 8 or not 0 < width <= WIDEST:
            return f"the fused retention takes widths that are multiples of 8 up to {WIDEST}, not {name} {width}"
    if v.numel() == 0:
        return f"the fused retention takes at least one token, not v of shape {tuple(v.shape)}"
    return None


def fused_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    resets: Tensor | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, T, dv) in v.dtype and final state (B, H, dk, dv) in fp32.

    The contract of ``retention.retention`` for tensors of which ``unsupported`` says None, with the initial ``state``
    given. Tensors may have any strides; only where those of single elements are not 1 are they copied. ``chunk_size``,
    CHUNK by default, is rounded up to whole tiles. Bits repeat from run to run.
    """
    results: tuple[Tensor, Tensor] = _FusedRetention.apply(  # type: ignore[no-untyped-call]
        q, k, v, log_decay, state, resets, CHUNK if chunk_size is None else chunk_size
    )
    return results


class _FusedRetention(torch.autograd.Function):
    """Keeps its inputs and the state that enters each chunk; scores are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        state: Tensor,
        resets: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_dense_rows(x) for x in (q, k, v))
        ctx.plan = plan = _plan(q, v, log_decay.dim() == 1, chunk_size)
        decay = plan.decay(log_decay, resets)
        entering, final_state, _ = _scan(k, v, state.float(), decay, plan)
        output, _ = _mix(q, k, v, entering, decay, plan)
        ctx.save_for_backward(q, k, v, log_decay, resets, entering, final_state)
        return output, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, resets, entering, final_state = ctx.saved_tensors
        plan: _Plan = ctx.plan
        upstream = _dense_rows(grad_output)
        decay = plan.decay(log_decay, resets)
        gated = ctx.needs_input_grad[3]
        leaving_states = (entering, final_state) if gated else None
        grad_leaving, grad_state, grad_exits = _scan(
            q, upstream, grad_final, decay, plan, backwards=True, leaving_states=leaving_states
        )
        grad_q, query_sums = _mix(upstream, v, k, entering.mT, decay, plan, partner=q if gated else None)
        grad_k, key_sums = _mix(
            v, upstream, q, grad_leaving.mT, decay, plan, reverse=True, partner=k if gated else None
        )
        grad_v, _ = _mix(k, q, upstream, grad_leaving, decay, plan, reverse=True)
        grad_decay = None
        if query_sums is not None and key_sums is not None and grad_exits is not None:
            grad_sums = plan.chunked(query_sums - key_sums)
            grad = log_decay_gradient(grad_sums, grad_exits, plan.chunked_resets(resets))
            grad_decay = grad.flatten(-2)[..., : plan.length].to(log_decay.dtype)
        return grad_q, grad_k, grad_v, grad_decay, grad_state, None, None


class _Decay(NamedTuple):
    """What the kernels read decays from."""

    sums: Tensor
    """Log-decays (H,) where they are fixed, else their running sums in each chunk (B, H, N, C); fp32."""
    counts: Tensor | None
    """Resets from the start of the chunk up to each token, (B, 1, N, C) int32."""


class _Plan(NamedTuple):
    """How a call is cut: ``batch`` x ``heads`` sequences of ``length`` tokens in N chunks of C = ``size``."""

    batch: int
    heads: int
    length: int
    size: int
    fixed: bool

    @property
    def chunks(self) -> int:
        """N, of which the last chunk may be cut short by the end of the sequence."""
        return -(-self.length // self.size)

    def chunked(self, x: Tensor) -> Tensor:
        """(..., T) to (..., N, C); zeros, the log-decay that changes nothing, follow the last token."""
        padding = self.chunks * self.size - self.length
        return torch.nn.functional.pad(x, (0, padding)).view(*x.shape[:-1], self.chunks, self.size)

    def chunked_resets(self, resets: Tensor | None) -> Tensor | None:
        """(B, T) to (B, 1, N, C)."""
        return None if resets is None else self.chunked(resets).unsqueeze(1)

    def decay(self, log_decay: Tensor, resets: Tensor | None) -> _Decay:
        """The tables of log_decay (H,) or (B, H, T) and of resets (B, T)."""
        sums = log_decay.float()
        sums = sums.contiguous() if self.fixed else self.chunked(sums).cumsum(dim=-1)
        cut = self.chunked_resets(resets)
        return _Decay(sums, None if cut is None else cut.cumsum(dim=-1, dtype=torch.int32))


def _plan(q: Tensor, v: Tensor, fixed: bool, chunk_size: int) -> _Plan:
    """Chunks are whole tiles of every kernel, and no longer than the sequence needs."""
    dk, dv = q.shape[-1], v.shape[-1]
    step = max(
        _tiles(kernel, *widths, v).rows
        for kernel, widths in (
            ("retention_states", (dk, dv)),
            ("retention_tokens", (dk, dv)),
            ("retention_tokens", (dv, dk)),
        )
    )
    size = triton.cdiv(min(chunk_size, v.shape[2]), step) * step
    batch, heads, length, _ = v.shape
    return _Plan(batch, heads, length, size, fixed)


def _tiles(kernel: str, inner: int, width: int, x: Tensor) -> Tiles:
    return tiles(kernel, padded(inner), padded(width), x.element_size())


def _dense_rows(x: Tensor) -> Tensor:
    """``x`` with elements of a row side by side; views that permute or slice other dimensions stay views."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _scan(
    x: Tensor,
    y: Tensor,
    start: Tensor,
    decay: _Decay,
    plan: _Plan,
    *,
    backwards: bool = False,
    leaving_states: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """States (B, H, N, dk, dv) in y.dtype, the last one in fp32, and <U, S_out> (B, H, N) of a backwards scan.

    The last needs ``leaving_states``, the states and the last one of the scan in order. For x, y and the rest see
    ``scan_states``.
    """
    dk, dv = x.shape[-1], y.shape[-1]
    tile = _tiles("retention_states", dk, dv, y)
    block_k, block_v = min(tile.keys, padded(dk)), min(tile.keys, padded(dv))
    blocks = triton.cdiv(dk, block_k) * triton.cdiv(dv, block_v)
    states = y.new_empty((plan.batch, plan.heads, plan.chunks, dk, dv))
    end = start.new_empty((plan.batch, plan.heads, dk, dv))
    others, other_end = leaving_states or (None, None)
    products = None if others is None else end.new_empty((blocks, plan.batch, plan.heads, plan.chunks))
    with device_of(y):
        scan_states[(blocks * plan.batch * plan.heads,)](
            *(x, y, start.contiguous(), states, end, others, other_end, products, *decay),
            *(*x.stride()[:3], *y.stride()[:3]),
            *(plan.heads, plan.length, plan.chunks),
            DK=dk,
            DV=dv,
            CHUNK=plan.size,
            ROWS=tile.rows,
            BLOCK_K=block_k,
            BLOCK_V=block_v,
            FIXED=plan.fixed,
            RESETS=decay.counts is not None,
            BACKWARDS=backwards,
            PRODUCTS=products is not None,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return states, end, None if products is None else products.sum(dim=0)


def _mix(
    left: Tensor,
    right: Tensor,
    source: Tensor,
    states: Tensor,
    decay: _Decay,
    plan: _Plan,
    *,
    reverse: bool = False,
    partner: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The result (B, H, T, d) of ``mix_tokens``, like ``source``, and its products (B, H, T) with ``partner`` if given.

    ``states`` (B, H, N, d of left, d of source) may be transposed in the last two dimensions.
    """
    inner, width = left.shape[-1], source.shape[-1]
    tile = _tiles("retention_tokens", inner, width, source)
    block_inner, block_width = min(tile.keys, padded(inner)), min(tile.keys, padded(width))
    blocks = triton.cdiv(width, block_width)
    result = _dense_rows(torch.empty_like(source))
    products = None
    if partner is not None:
        products = decay.sums.new_empty((blocks, plan.batch, plan.heads, plan.length))
    with device_of(source):
        mix_tokens[(blocks * triton.cdiv(plan.length, tile.rows) * plan.batch * plan.heads,)](
            *(left, right, source, states, result, partner, products, *decay),
            *(*left.stride()[:3], *right.stride()[:3], *source.stride()[:3], *result.stride()[:3]),
            *((0, 0, 0) if partner is None else partner.stride()[:3]),
            *states.stride()[-2:],
            *(plan.heads, plan.length),
            INNER=inner,
            WIDTH=width,
            CHUNK=plan.size,
            ROWS=tile.rows,
            BLOCK_INNER=block_inner,
            BLOCK_WIDTH=block_width,
            FIXED=plan.fixed,
            RESETS=decay.counts is not None,
            REVERSED=reverse,
            PRODUCTS=products is not None,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return result, None if products is None else products.sum(dim=0)
