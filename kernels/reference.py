"""Naive references of the kernels: the papers' formulas, quadratic in memory, differentiated by autograd.

They compute in fp32 at least (in fp64 for fp64 inputs) and are what the fast paths are tested against.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .precision import accumulation_dtype


def visible(
    queries: int, keys: int, window: int | None, device: torch.device, document_start: Tensor | None = None
) -> Tensor:
    """Boolean (queries, keys): what each query sees, the queries being the last of the ``keys`` positions.

    Causal; with ``window`` = C each query sees itself and the C - 1 tokens before it. With ``document_start``
    (B, queries), the first key of each query's document, (B, 1, queries, keys), nothing before that key.
    """
    index = torch.arange(keys, device=device)
    age = index[keys - queries :].unsqueeze(1) - index
    seen = (age >= 0) if window is None else (age >= 0) & (age < window)
    return seen if document_start is None else seen & (index >= document_start[:, None, :, None])


def softmax_maps(
    q: Tensor, k: Tensor, window: int | None = None, document_start: Tensor | None = None
) -> Tensor:
    """Attention maps (B, H, Tq, Tk) of q (B, H, Tq, d) and k (B, H, Tk, d), with scale d^-0.5."""
    wide = accumulation_dtype(q)
    scores: Tensor = q.to(wide) @ k.to(wide).mT / math.sqrt(q.shape[-1])
    hidden = ~visible(q.shape[2], k.shape[2], window, q.device, document_start)
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, document_start: Tensor | None = None
) -> Tensor:
    """Causal softmax attention with grouped K,V heads; the contract of ``attention.attention``."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    maps = softmax_maps(q, k, window, document_start)
    return (maps @ v.to(maps.dtype)).to(q.dtype)


def differential_attention(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, window: int | None = None, document_start: Tensor | None = None
) -> Tensor:
    """(A1 - lam A2) V; the contract of ``differential.differential_attention``."""
    group = q.shape[1] // k.shape[1]
    first, second = (
        softmax_maps(q[:, s::2], k[:, s::2].repeat_interleave(group, dim=1), window, document_start)
        for s in (0, 1)
    )
    maps = first - lam.to(first.dtype) * second
    return (maps @ v.repeat_interleave(group, dim=1).to(maps.dtype)).to(q.dtype)


def differential_attention_v2(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, window: int | None = None, document_start: Tensor | None = None
) -> Tensor:
    """a[2i] - lam[i] a[2i+1]; the contract of ``differential.differential_attention_v2``."""
    wide = accumulation_dtype(q)
    heads = attention(q.to(wide), k.to(wide), v.to(wide), window, document_start)
    return (heads[:, 0::2] - lam.to(wide).unsqueeze(-1) * heads[:, 1::2]).to(q.dtype)


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Parallel form, o = (q k^T . D) v, D_nm = a_{m+1} ... a_n; the contract of ``retention.retention``.

    D_nm is 0 where one of the tokens m + 1 .. n resets.
    """
    c = _per_token(log_decay, v).cumsum(dim=-1)
    q, k, values = q.to(c.dtype), k.to(c.dtype), v.to(c.dtype)
    # How many tokens up to each one have reset: (B, 1, T), or a single 0 that equals everything.
    count = c.new_zeros(1) if resets is None else resets.cumsum(dim=-1).unsqueeze(1)
    seen = visible(c.shape[-1], c.shape[-1], None, c.device) & (count.unsqueeze(-1) == count.unsqueeze(-2))
    decay = (c.unsqueeze(-1) - c.unsqueeze(-2)).masked_fill(~seen, -torch.inf).exp()
    output = (q @ k.mT * decay) @ values
    state = (k * decay[:, :, -1, :, None]).mT @ values
    if initial_state is not None:
        since_entry = (c.exp() * (count == 0))[..., None]
        output = output + q * since_entry @ initial_state.to(c.dtype)
        state = state + since_entry[:, :, -1:] * initial_state.to(c.dtype)
    return output.to(v.dtype), state


def retention_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Recurrent form, S_n = a_n S_{n-1} + k_n^T v_n, o_n = q_n S_n; contract of ``retention.retention``."""
    decay = _per_token(log_decay, v).exp()
    if resets is not None:
        decay = decay.masked_fill(resets.unsqueeze(1), 0)
    q, k, values = q.to(decay.dtype), k.to(decay.dtype), v.to(decay.dtype)
    if initial_state is None:
        initial_state = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    state, outputs = initial_state.to(decay.dtype), []
    for n in range(v.shape[2]):
        state = decay[:, :, n, None, None] * state + k[:, :, n, :, None] * values[:, :, n, None, :]
        outputs.append((q[:, :, n, None] @ state).squeeze(2))
    return torch.stack(outputs, dim=2).to(v.dtype), state


def _per_token(log_decay: Tensor, v: Tensor) -> Tensor:
    """Log-decays of either kind as (B, H, T), in the accumulation dtype."""
    log_decay = log_decay.to(accumulation_dtype(v))
    return log_decay[None, :, None].expand(v.shape[:3]) if log_decay.dim() == 1 else log_decay
