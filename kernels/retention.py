"""Retention with a fixed or a per-token decay (RetNet, arXiv 2307.08621; gated in YOCO, arXiv 2405.05254).

S_n = a_n S_{n-1} + k_n^T v_n and o_n = q_n S_n, without the score normalisation of RetNet's code: the norm
per head that follows removes any factor that a row has in common. Where a document starts, the term with S_{n-1}
is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..configs.errors import UsageError
from . import reference
from .chunkwise import chunkwise_retention
from .dispatch import Backend, resolve
from .precision import accumulation_dtype
from .shapes import check_one_dtype
from .state import weighted_key_values

CHUNK = 128
"""Tokens of a chunk on the torch path: fewer leave more to the states, more to the square inside a chunk."""


def fixed_decay_log(
    heads: int,
    *,
    first: int = 0,
    total: int | None = None,
    schedule: Literal["default", "experiments"] = "default",
) -> Tensor:
    """log(gamma), (heads,) fp32, of the global heads first .. first + heads - 1 out of ``total``.

    ``default``: gamma_h = 1 - 2^(-5-h). ``experiments``: gamma = 1 - exp(linspace(log 1/32, log 1/512,
    total)), the schedule of the RetNet paper's runs. ``total`` defaults to ``heads``. Raises UsageError for
    heads outside.

    The logarithm is log1p in fp64, because 1 - 2^(-5-h) rounds to 1 in fp32 from h = 20 on: those heads would
    never decay.
    """
    total = heads if total is None else total
    if first < 0 or first + heads > total:
        raise UsageError(
            f"heads {first} to {first + heads - 1} are not among {total}; pass the model's as total"
        )
    if schedule == "default":
        forgotten = 2.0 ** (-5 - torch.arange(total, dtype=torch.float64))
    else:
        forgotten = torch.linspace(math.log(1 / 32), math.log(1 / 512), total, dtype=torch.float64).exp()
    return torch.log1p(-forgotten)[first : first + heads].float()


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, T, dv) in v.dtype and final state (B, H, dk, dv) in fp32 (fp64 for fp64); memory O(T).

    q and k (B, H, T, dk), k already scaled, v (B, H, T, dv), of one dtype. ``log_decay``, finite and not
    positive, is (H,) for a fixed decay per head, which takes no gradient, or (B, H, T) per token.
    ``initial_state`` (B, H, dk, dv) is the state before the first token, zero by default. ``resets`` (B, T)
    bool is True at tokens that forget everything before them, initial state included: the first tokens of
    packed documents. Differentiable once in q, k, v, a per-token log_decay and initial_state, through both
    results. Decays, states and the scan are fp32 at least. ``chunk_size`` changes speed, and results only by
    rounding; by default it is the fastest. Raises UsageError for arguments that do not fit.
    """
    _check(q, k, v, initial_state, chunk_size)
    _check_decay(log_decay, resets, v)
    implementation = resolve(backend, q.device, _fused_refusal(q, k, v))
    if implementation == "reference":
        return reference.retention(q, k, v, log_decay, initial_state, resets)
    if initial_state is None:
        initial_state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    state = initial_state.to(accumulation_dtype(v))
    if implementation == "triton":
        from .fused.retention import fused_retention

        return fused_retention(q, k, v, log_decay, state, resets, chunk_size=chunk_size)
    return chunkwise_retention(q, k, v, log_decay, state, chunk_size or CHUNK, resets)


def _fused_refusal(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], str | None]:
    def reason() -> str | None:
        from .fused.retention import unsupported

        return unsupported(q, k, v)

    return reason


def chunk_state(
    k: Tensor, v: Tensor, log_decay: Tensor, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What a chunk does to the state that passes through it: S_out = decay * S_in + state.

    k (B, H, T, dk) and v (B, H, T, dv) of one dtype; ``log_decay`` (H,) or (B, H, T) and ``resets`` (B, T) as for
    ``retention``. Returns the state (B, H, dk, dv) that the chunk leaves from an empty start and the decay (B, H)
    across it, 0 where a token resets; both in fp32 (fp64 for fp64). Differentiable once in k, v and a per-token
    log_decay. Ranks that hold one chunk each exchange these instead of tokens. Raises UsageError for arguments that
    do not fit.
    """
    if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or 0 in (*k.shape, *v.shape):
        shapes = f"k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise UsageError(f"the state of a chunk got {shapes}; use (B, H, T, dk) and (B, H, T, dv), none of them 0")
    check_one_dtype("the state of a chunk", k, v)
    _check_decay(log_decay, resets, v)
    log_decay = log_decay.to(accumulation_dtype(v))
    if log_decay.dim() == 1:
        log_decay = log_decay[:, None].expand(k.shape[:3])
    # A difference of sums from the start would leave rounding errors in the gradients of decays before a reset.
    until_exit = functional.pad(log_decay[..., 1:], (0, 1)).flip(-1).cumsum(dim=-1).flip(-1).exp()
    # Beside the last token's weight of 1 smaller ones vanish, and on a CPU subnormal products are ten times slower.
    until_exit = functional.threshold(until_exit, 1e-30, 0.0)
    across = log_decay.sum(dim=-1).exp()
    if resets is not None:
        count = resets.cumsum(dim=-1).unsqueeze(1)
        until_exit = until_exit * (count == count[..., -1:])
        across = across * (count[..., -1] == 0)
    return weighted_key_values(k, v, until_exit), across


def _check(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, chunk_size: int | None) -> None:
    one_shape = q.dim() == v.dim() == 4 and q.shape == k.shape and q.shape[:3] == v.shape[:3]
    if not one_shape or 0 in (*q.shape, *v.shape):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise UsageError(f"retention got {shapes}; use (B, H, T, dk) twice and (B, H, T, dv), none of them 0")
    check_one_dtype("retention", q, k, v)
    if initial_state is not None and initial_state.shape != (*q.shape[:2], q.shape[-1], v.shape[-1]):
        raise UsageError(f"retention got a state of shape {tuple(initial_state.shape)}; use (B, H, dk, dv)")
    if chunk_size is not None and chunk_size < 1:
        raise UsageError(f"retention chunk_size is {chunk_size}; use a positive number, such as 128")


def _check_decay(log_decay: Tensor, resets: Tensor | None, v: Tensor) -> None:
    if log_decay.shape not in (v.shape[1:2], v.shape[:3]):
        raise UsageError(f"retention got log_decay of shape {tuple(log_decay.shape)}; use (H,) or (B, H, T)")
    if log_decay.dim() == 1 and log_decay.requires_grad:
        raise UsageError(
            "retention got a fixed log_decay that requires a gradient; use (B, H, T) to train it"
        )
    if resets is not None and (resets.shape != (v.shape[0], v.shape[2]) or resets.dtype != torch.bool):
        got = f"{resets.dtype} of shape {tuple(resets.shape)}"
        raise UsageError(f"retention got resets {got} for v {tuple(v.shape)}; use torch.bool of shape (B, T)")
