"""The chunkwise form of retention: batched products inside the chunks and a scan over their states.

With c the inclusive running sum of log a from the start of a chunk of C tokens, and D_ij = exp(c_i - c_j) for
j <= i, else 0:

    o_i   = sum_j D_ij (q_i . k_j) v_j  +  exp(c_i) q_i S_in
    S_out = exp(c_C) S_in  +  sum_j exp(c_C - c_j) k_j^T v_j

A fixed decay is the case c_i = i log(gamma), equal in all chunks and sequences: its tables have size 1 there
and broadcast. Only differences with j <= i are exponentiated; they are never positive, so nothing overflows.

Where documents are kept apart, a token that resets forgets what came before it. With r_i the number of resets
from the start of the chunk up to token i, D_ij is 0 unless r_i = r_j, exp(c_i) unless r_i = 0, exp(c_C - c_j)
unless r_j = r_C, and exp(c_C) unless r_C = 0. The decays themselves stay finite: a log-decay of -inf would turn
their differences into NaN.

Backward, with P = (Q K^T) . D and U the gradient of S_out, which a scan in the other direction gives:

    dP = (dO V^T) . D                               dV = P^T dO + exp(c_C - c) K U
    dQ = dP K + exp(c) dO S_in^T                    dK = dP^T Q + exp(c_C - c) V U^T
    dc_i = q_i . dq_i - k_i . dk_i                  dc_C += <U, S_out>

The last line holds because only the products q exp(c), k exp(-c) and exp(c_C) S_out exp(-c_C) occur; resets
multiply them by constants.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .decay_gradient import log_decay_gradient
from .precision import accumulate_bmm_, operand, wide_bmm


def chunkwise_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    chunk_size: int,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs and final state; the contract of ``retention.retention``, ``state`` given and in the accumulation dtype.

    The tokens after the last whole chunk form one shorter chunk: padding would let the state decay too far.
    """
    results: tuple[Tensor, Tensor] = _ChunkwiseRetention.apply(  # type: ignore[no-untyped-call]
        q, k, v, log_decay, state, chunk_size, resets
    )
    return results


class _ChunkwiseRetention(torch.autograd.Function):
    """Keeps its inputs and the state that enters each chunk; scores are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        state: Tensor,
        chunk_size: int,
        resets: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        output = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        ctx.spans, entering = _spans(v, chunk_size), []
        for span in ctx.spans:
            inputs = span.of(q, k, v, log_decay.to(state.dtype), resets)
            part, states, state = _forward(inputs, state, span.cut)
            span.tokens(output).copy_(part)
            entering.append(states)
        ctx.save_for_backward(q, k, v, log_decay, resets, state, *entering)
        return output, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, resets, final_state, *entering = ctx.saved_tensors
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        grad_decay = torch.empty_like(log_decay) if ctx.needs_input_grad[3] else None
        leaving = [states[:, :, 0] for states in entering[1:]] + [final_state]
        for span, states, state in reversed(list(zip(ctx.spans, entering, leaving, strict=True))):
            inputs = span.of(q, k, v, log_decay.to(states.dtype), resets)
            upstream = span.cut.rows(span.tokens(grad_output))
            part = _backward(inputs, upstream, grad_state, states, span.cut)
            grad_state = part.entering
            for grad, values in zip(grads, part[:3], strict=True):
                span.tokens(grad).copy_(span.cut.split(values).flatten(2, 3))
            if grad_decay is not None:
                sums = span.cut.split((inputs.q * part.q).addcmul_(inputs.k, part.k, value=-1).sum(dim=-1))
                exits = _grad_exits(part.leaving, states, state)
                decays = log_decay_gradient(sums, exits, span.cut.resets(inputs.resets))
                span.tokens(grad_decay).copy_(decays.flatten(2))
        return *grads, grad_decay, grad_state, None, None


class _Span(NamedTuple):
    """Tokens that go through the products together, cut into chunks of one size."""

    start: int
    stop: int
    cut: _Cut

    def tokens(self, x: Tensor) -> Tensor:
        """Those of x (B, H, T, ...)."""
        return x[:, :, self.start : self.stop]

    def of(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, resets: Tensor | None) -> _Inputs:
        """The part of everything that a pass reads."""
        decay = log_decay if log_decay.dim() == 1 else self.tokens(log_decay)
        resets = None if resets is None else resets[:, self.start : self.stop]
        queries, keys, values = (self.cut.rows(self.tokens(x)) for x in (q, k, v))
        return _Inputs(queries, keys, values, decay, resets)


def _spans(v: Tensor, chunk_size: int) -> list[_Span]:
    """The sequence of v (B, H, T, dv) in order. On a CPU the scores of a span stay in cache, 4 MB of them at most."""
    batch, heads, length, _ = v.shape
    chunk_size = min(chunk_size, length)
    whole = length - length % chunk_size
    budget = 2**20 if v.device.type == "cpu" else 2**27
    step = chunk_size * max(1, budget // (batch * heads * chunk_size**2))
    bounds = [(start, min(start + step, whole), chunk_size) for start in range(0, whole, step)]
    if whole < length:
        bounds.append((whole, length, length - whole))
    return [_Span(a, b, _Cut(batch, heads, (b - a) // size, size)) for a, b, size in bounds]


class _Inputs(NamedTuple):
    """What a pass over a span reads."""

    q: Tensor
    """(B*H*N, C, dk), as k; v likewise with dv."""
    k: Tensor
    v: Tensor
    log_decay: Tensor
    """(H,) or (B, H, N*C), in the accumulation dtype."""
    resets: Tensor | None
    """(B, N*C)."""


def _forward(x: _Inputs, state: Tensor, cut: _Cut) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, H, N*C, dv) of a span, the state that enters each of its chunks, and the state that leaves it."""
    decay = _decay_tables(x.log_decay, x.resets, cut)
    entering = cut.split(wide_bmm(cut.scaled(x.k, decay.until_exit).mT, x.v))
    state = _scan_(entering, decay.across, state)
    output = wide_bmm(cut.scaled(x.q, decay.since_entry), cut.merge(entering).to(x.v.dtype))
    scores = cut.scale_(wide_bmm(x.q, x.k.mT), *decay.within)
    accumulate_bmm_(output, scores.to(x.v.dtype), x.v)
    return cut.split(output).flatten(2, 3), entering, state


class _Gradients(NamedTuple):
    """What the backward pass of a span gives."""

    q: Tensor
    """(B*H*N, C, dk), as k; v likewise with dv."""
    k: Tensor
    v: Tensor
    leaving: Tensor
    """(B, H, N, dk, dv): U, of the state that leaves each chunk."""
    entering: Tensor
    """(B, H, dk, dv): of the state that enters the span."""


def _backward(x: _Inputs, upstream: Tensor, grad_state: Tensor, entering: Tensor, cut: _Cut) -> _Gradients:
    """From ``upstream`` = dO (B*H*N, C, dv), the gradient of the state that leaves, and S_in of each chunk."""
    decay = _decay_tables(x.log_decay, x.resets, cut)
    grad_leaving = cut.split(wide_bmm(cut.scaled(x.q, decay.since_entry).mT, upstream))
    grad_state = _scan_(grad_leaving, decay.across, grad_state, backwards=True)
    states, grad_states = (cut.merge(s).to(x.v.dtype) for s in (entering, grad_leaving))
    grad_q, grad_k = _grad_queries_keys(x.q, x.k, x.v, upstream, states, grad_states, decay, cut)
    grad_v = _grad_values(x.q, x.k, upstream, grad_states, decay, cut)
    return _Gradients(grad_q, grad_k, grad_v, grad_leaving, grad_state)


class _Cut(NamedTuple):
    """How a sequence is cut: into ``chunks`` pieces of ``size`` tokens, N and C in the shapes below."""

    batch: int
    heads: int
    chunks: int
    size: int

    def rows(self, x: Tensor) -> Tensor:
        """(B, H, T, d) to (B*H*N, C, d), ready for matrix products."""
        return operand(x).reshape(-1, self.size, x.shape[-1])

    def resets(self, resets: Tensor | None) -> Tensor | None:
        """(B, T) to (B, 1, N, C)."""
        return None if resets is None else resets.contiguous().view(self.batch, 1, self.chunks, self.size)

    def split(self, x: Tensor) -> Tensor:
        """(B*H*N, ...) to (B, H, N, ...)."""
        return x.view((self.batch, self.heads, self.chunks, *x.shape[1:]))

    def merge(self, x: Tensor) -> Tensor:
        """(B, H, N, ...) to (B*H*N, ...)."""
        return x.flatten(0, 2)

    def scale_(self, x: Tensor, *tables: Tensor) -> Tensor:
        """Multiply x (B*H*N, ...) in place by tables that broadcast over (B, H, N, ...)."""
        for table in tables:
            self.split(x).mul_(table)
        return x

    def scaled(self, x: Tensor, table: Tensor) -> Tensor:
        """The same product as a new tensor, computed in the dtype of the table and rounded to that of x."""
        return self.merge(self.split(x) * table).to(x.dtype)


class _Decay(NamedTuple):
    """Decays inside the chunks; (B, H, N) below is (1, H, 1) where the decay is fixed and nothing resets."""

    within: tuple[Tensor, ...]
    """Tables whose product is D_ij (B, H, N, C, C), from token j to token i."""
    since_entry: Tensor
    """(B, H, N, C, 1): exp(c_i), from the entry of the chunk to token i."""
    until_exit: Tensor
    """(B, H, N, C, 1): exp(c_C - c_j), from token j to the exit of the chunk."""
    across: Tensor
    """(B, H, N): exp(c_C), over the whole chunk."""


def _decay_tables(log_decay: Tensor, resets: Tensor | None, cut: _Cut) -> _Decay:
    """Tables of log_decay (H,) or (B, H, T), in its dtype."""
    if log_decay.dim() == 1:
        tokens = torch.arange(1, cut.size + 1, dtype=log_decay.dtype, device=log_decay.device)
        c = torch.outer(log_decay, tokens)[None, :, None]
    else:
        c = log_decay.reshape(*cut).cumsum(dim=-1)
    # Zeroing positive differences keeps exp in range; exp of a filled-in -inf is ten times slower on a CPU.
    within = (c.unsqueeze(-1) - c.unsqueeze(-2)).tril_().exp_().tril_()
    last = c[..., -1:]
    decay = _Decay((within,), c.exp().unsqueeze(-1), (last - c).exp().unsqueeze(-1), last.squeeze(-1).exp())
    resets = cut.resets(resets)
    return decay if resets is None else _with_resets(decay, resets)


def _with_resets(decay: _Decay, resets: Tensor) -> _Decay:
    """The tables with zeros where one of ``resets`` (B, 1, N, C) comes between."""
    count = resets.cumsum(dim=-1)
    first, last = count == 0, count == count[..., -1:]
    same = (count.unsqueeze(-1) == count.unsqueeze(-2)).to(decay.across.dtype)
    return _Decay(
        # Apart, a table of all heads and one of all chunks stay small; their product would be one per head and chunk.
        (*decay.within, same),
        decay.since_entry * first.unsqueeze(-1),
        decay.until_exit * last.unsqueeze(-1),
        decay.across * first[..., -1],
    )


def _scan_(increments: Tensor, decay: Tensor, state: Tensor, *, backwards: bool = False) -> Tensor:
    """state <- decay * state + increment over the chunks, in order or backwards; returns the last state.

    Each increment (B, H, N, dk, dv) is replaced in place by the state before it.
    """
    chunks = increments.shape[2]
    decay = decay.expand(-1, -1, chunks)[..., None, None]
    for n in reversed(range(chunks)) if backwards else range(chunks):
        following = torch.addcmul(increments[:, :, n], decay[:, :, n], state)
        increments[:, :, n] = state
        state = following
    return state


def _grad_queries_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    upstream: Tensor,
    states: Tensor,
    grad_states: Tensor,
    decay: _Decay,
    cut: _Cut,
) -> tuple[Tensor, Tensor]:
    """dQ and dK (B*H*N, C, dk), from ``upstream`` = dO, ``states`` = S_in and ``grad_states`` = U."""
    grad_scores = cut.scale_(wide_bmm(upstream, v.mT), *decay.within).to(v.dtype)
    grad_q = cut.scale_(wide_bmm(upstream, states.mT), decay.since_entry)
    grad_k = cut.scale_(wide_bmm(v, grad_states.mT), decay.until_exit)
    return accumulate_bmm_(grad_q, grad_scores, k), accumulate_bmm_(grad_k, grad_scores.mT, q)


def _grad_values(
    q: Tensor, k: Tensor, upstream: Tensor, grad_states: Tensor, decay: _Decay, cut: _Cut
) -> Tensor:
    """dV (B*H*N, C, dv), from ``upstream`` = dO and ``grad_states`` = U."""
    scores = cut.scale_(wide_bmm(q, k.mT), *decay.within).to(upstream.dtype)
    return accumulate_bmm_(wide_bmm(cut.scaled(k, decay.until_exit), grad_states), scores.mT, upstream)


def _grad_exits(grad_leaving: Tensor, entering: Tensor, final_state: Tensor) -> Tensor:
    """<U, S_out> (B, H, N), from ``grad_leaving`` = U and ``entering`` = S_in of each chunk.

    S_out of chunk n is ``entering`` of n + 1.
    """
    inner = (grad_leaving[:, :, :-1] * entering[:, :, 1:]).sum(dim=(-1, -2))
    last = (grad_leaving[:, :, -1] * final_state).sum(dim=(-1, -2))
    return torch.cat((inner, last.unsqueeze(-1)), dim=-1)
