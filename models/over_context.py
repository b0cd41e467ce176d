"""Mixers whose sequence is divided over ranks: each queries what it holds, and reaches the past that others hold.

With one context rank all of this reduces to one call of the kernel. Tensors are (B, heads, S, d) of this rank's heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from ..kernels.dispatch import Backend
from ..kernels.retention import chunk_state, retention
from ..parallel.context import ContextParallel
from .heads import merge_heads, split_heads
from .recompute import recomputed
from .sequences import Sequences

SoftmaxCore = Callable[..., Tensor]
"""A kernel (q, k, v, *per_query, document_start=) whose queries are the last of the positions of its keys.

``per_query`` are further inputs (B, heads, Sq, width) of the queries.
"""


def attend(
    core: SoftmaxCore, q: Tensor, k: Tensor, v: Tensor, *per_query: Tensor, sequences: Sequences
) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks."""
    context = sequences.context
    if context.share.size == 1:
        return core(q, k, v, *per_query, document_start=sequences.document_start)
    if context.exchange == "all_to_all":
        return _attend_by_heads(core, q, k, v, *per_query, sequences=sequences)
    with context.gathered(_packed(k, v), recomputed=sequences.recomputed) as whole:
        return attend_whole(core, q, *_unpacked(whole, k, v), *per_query, sequences=sequences)


def attend_whole(
    core: SoftmaxCore, q: Tensor, k: Tensor, v: Tensor, *per_query: Tensor, sequences: Sequences
) -> Tensor:
    """The same where k and v already hold the whole sequence."""
    share = sequences.share
    outputs = []
    for span, queries, *others in zip(share.spans, *(share.cut(x, 2) for x in (q, *per_query)), strict=True):
        keys, values = k[:, :, : span.stop], v[:, :, : span.stop]
        outputs.append(core(queries, keys, values, *others, document_start=sequences.starts(span)))
    return _joined(outputs)


def attend_window(
    core: SoftmaxCore, q: Tensor, k: Tensor, v: Tensor, *, window: int, sequences: Sequences
) -> Tensor:
    """Attention within a window: each chunk needs the ``window`` - 1 keys before it and no others."""
    share, context = sequences.share, sequences.context
    if share.size == 1:
        return core(q, k, v, document_start=sequences.document_start)
    own = _packed(k, v)
    halos = context.halo(own, window - 1)
    outputs = []
    for span, queries, chunk, halo in zip(share.spans, share.cut(q, 2), share.cut(own, 0), halos, strict=True):
        starts = sequences.starts(span, first_key=span.start - halo.shape[0])
        outputs.append(core(queries, *_unpacked(torch.cat([halo, chunk]), k, v), document_start=starts))
    return _joined(outputs)


def retain(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, backend: Backend, sequences: Sequences
) -> Tensor:
    """Retention over all ranks: chunks exchange the states that they leave, whatever their length.

    Each chunk computes the state S_c that it leaves from an empty start and the decay A_c of a state across it; all
    are gathered, and P_0 = 0, P_{c+1} = A_c P_c + S_c are the states that enter the chunks.
    """
    share = sequences.share
    if share.size == 1:
        resets = sequences.resets(range(share.length))
        return retention(q, k, v, log_decay, resets=resets, backend=backend)[0]
    decays = [log_decay] * len(share.spans) if log_decay.dim() == 1 else share.cut(log_decay, 2)
    starts = [sequences.resets(span) for span in share.spans]
    queries, keys, values = (share.cut(x, 2) for x in (q, k, v))
    left = [chunk_state(*chunk) for chunk in zip(keys, values, decays, starts, strict=True)]
    # The gathered states of all ranks are not kept for the backward pass: they would grow with the number of ranks.
    combine = _entering_states if sequences.recomputed else partial(recomputed, _entering_states)
    entering = combine(left, sequences.context)
    chunks = zip(queries, keys, values, decays, entering, starts, strict=True)
    return _joined(
        retention(q_c, k_c, v_c, decay, initial_state=state, resets=reset, backend=backend)[0]
        for q_c, k_c, v_c, decay, state, reset in chunks
    )


def _entering_states(left: list[tuple[Tensor, Tensor]], context: ContextParallel) -> list[Tensor]:
    """The states (B, H, dk, dv) that enter this rank's chunks, from (state left, decay across) of each of them."""
    shape = left[0][0].shape
    # One collective brings both.
    packed = torch.stack([torch.cat([state.flatten(2), decay.unsqueeze(-1)], dim=-1) for state, decay in left])
    gathered = context.gather_chunks(packed)
    states, decays = gathered[..., :-1], gathered[..., -1]
    if not left[0][1].requires_grad:
        decays = decays.detach()
    return [_weighted(states, _survivals(decays, chunk)).view(shape) for chunk in context.share.chunks]


def _survivals(decays: Tensor, chunk: int) -> Tensor:
    """(chunks, B, H): which part of the state left by each chunk enters ``chunk``.

    Zero for ``chunk`` and those after it, and not left out: the gather must take part in what every rank computes.
    """
    survivals = [torch.zeros_like(decays[0])] * (decays.shape[0] - chunk)
    survival = torch.ones_like(decays[0])
    # A product at a time: the backward pass of cumprod asks the device whether there are zeros.
    for number in reversed(range(chunk)):
        survivals.append(survival)
        survival = survival * decays[number]
    return torch.stack(survivals[::-1])


def _weighted(states: Tensor, weights: Tensor) -> Tensor:
    """Sum over the chunks of weights (chunks, B, H) times states (chunks, B, H, n)."""
    return torch.einsum("cbh,cbhn->bhn", weights, states)


def _attend_by_heads(
    core: SoftmaxCore, q: Tensor, k: Tensor, v: Tensor, *per_query: Tensor, sequences: Sequences
) -> Tensor:
    """Exchange tokens for heads, attend to whole sequences, and exchange back."""
    context = sequences.context
    size = context.share.size
    inputs = (q, k, v, *per_query)
    grouped = [torch.unflatten(merge_heads(x), -1, (size, -1)) for x in inputs]
    whole = context.scatter_heads(torch.cat(grouped, dim=-1))
    parts = torch.split(whole, [x.shape[-1] for x in grouped], dim=-1)
    heads = [split_heads(part, x.shape[1] // size) for part, x in zip(parts, inputs, strict=True)]
    output = core(*heads, document_start=sequences.document_start)
    gathered = context.gather_heads(merge_heads(output)).flatten(2)
    return split_heads(gathered, output.shape[1] * size)


def _packed(k: Tensor, v: Tensor) -> Tensor:
    """K and V side by side, (S, B, W), so that one exchange brings both."""
    return torch.cat([merge_heads(k), merge_heads(v)], dim=-1)


def _unpacked(packed: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of ``_packed`` for any number of tokens, with heads as those of k and v; views."""
    keys, values = torch.split(packed, [k.shape[1] * k.shape[3], v.shape[1] * v.shape[3]], dim=-1)
    return split_heads(keys, k.shape[1]), split_heads(values, v.shape[1])


def _joined(outputs: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(outputs), dim=2)
