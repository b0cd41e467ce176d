"""Exact causal softmax attention tile by tile, with memory linear in the sequence length.

A tile is a block of queries against all the keys that they may see, so its softmax is complete: nothing needs
rescaling later, and the backward pass computes the same maps again instead of storing them or their
normalisers. Two maps over the same values, A1 - lam A2, go through as one. The values are multiplied once,
and the backward pass gets dV from one product and shares dP = dO V^T between the maps: 10 d multiplications
per element of a pair of maps, where two separate attentions need 14 d.

Layout inside: a lane is one (batch, value head). q (lanes, maps, group, Tq, d), k (lanes, maps, Tk, d), v
(lanes, Tk, dv), output (lanes, group, Tq, dv). The ``group`` of query heads that share a key head become rows
of one matrix product, so K and V are never repeated and their gradients sum over the group by themselves.
Where documents are kept apart, document_start (lanes, Tq) is the index of the first key of a query's document.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import accumulate_bmm_, accumulation_dtype, operand, wide_bmm


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lam: Tensor | None = None,
    window: int | None = None,
    document_start: Tensor | None = None,
) -> Tensor:
    """Causal softmax(q k^T d^-0.5) v, or (A1 - lam A2) v with two maps per value head; memory O(T).

    q (B, G*group*maps, Tq, d), k (B, G*maps, Tk, d), v (B, G, Tk, dv) of one dtype; with the 0-dim ``lam``
    maps is 2, and map s of pair i is at head 2i+s. The queries are the last Tq of the Tk positions; with
    ``window`` = C each sees itself and the C - 1 tokens before it. ``document_start`` (B, Tq) as for
    ``attention.attention``. Maps in fp32 (fp64 for fp64); returns (B, G*group, Tq, dv) in q.dtype.
    Differentiable once, in q, k, v and lam.
    """
    output: Tensor = _TiledAttention.apply(  # type: ignore[no-untyped-call]
        q, k, v, lam, window, document_start
    )
    return output


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lam: Tensor | None,
        window: int | None,
        document_start: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, lam, document_start)
        ctx.window = window
        queries, keys, values = _to_lanes(q, k, v)
        lanes, _, group, length, _ = queries.shape
        output = q.new_empty(lanes, group, length, v.shape[-1])
        starts = _starts_of_lanes(document_start, v)
        for parts in _lane_splits(window, queries, keys, values, output, *starts):
            _forward(*parts, lam=lam, window=window)
        return output.view(q.shape[0], -1, length, v.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lam, document_start = ctx.saved_tensors
        queries, keys, values = _to_lanes(q, k, v)
        lanes, _, group, length, _ = queries.shape
        upstream = operand(grad_output).reshape(lanes, group, length, v.shape[-1])
        wide = accumulation_dtype(q)
        grad_q = torch.empty_like(queries, dtype=wide)
        grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (keys, values))
        grad_lam = None if lam is None else torch.zeros_like(lam, dtype=wide)
        starts = _starts_of_lanes(document_start, v)
        for parts in _lane_splits(ctx.window, queries, keys, values, upstream, grad_q, grad_k, grad_v, *starts):
            _backward(*parts, lam=lam, grad_lam=grad_lam, window=ctx.window)
        grad_q = torch.unflatten(grad_q, 0, (q.shape[0], -1)).transpose(2, 3)
        grads = (grad.reshape(x.shape).to(x.dtype) for grad, x in ((grad_q, q), (grad_k, k), (grad_v, v)))
        return *grads, None if grad_lam is None else grad_lam.to(lam.dtype), None, None


def _to_lanes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs in the layout of the module docstring, ready for matrix products."""
    groups, maps = v.shape[1], k.shape[1] // v.shape[1]
    queries = torch.unflatten(operand(q), 1, (groups, -1, maps)).transpose(2, 3)
    keys = torch.unflatten(operand(k), 1, (groups, maps))
    return queries.flatten(0, 1), keys.flatten(0, 1), operand(v).flatten(0, 1)


def _starts_of_lanes(document_start: Tensor | None, v: Tensor) -> tuple[Tensor, ...]:
    """document_start (B, Tq) as a tuple of one tensor (lanes, Tq), empty where there is none."""
    return () if document_start is None else (document_start.repeat_interleave(v.shape[1], dim=0),)


def _rows(device: torch.device) -> int:
    """Queries per tile: few on a CPU, for tiles that stay in cache; many on a GPU, for fewer launches."""
    return 64 if device.type == "cpu" else 512


def _lane_splits(window: int | None, q: Tensor, k: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors cut along the lanes: the maps of a tile hold about 4 MB (on a GPU 512 MB) at most."""
    budget = 2**20 if q.device.type == "cpu" else 2**27
    rows = _rows(q.device)
    keys = k.shape[2] if window is None else min(k.shape[2], window + rows)
    lanes = max(1, budget // (q.shape[1] * q.shape[2] * rows * keys))
    return zip(*(torch.split(tensor, lanes) for tensor in (q, k, *others)), strict=True)


class _Tile(NamedTuple):
    """A block of queries and the range of keys that holds all that any of them sees."""

    queries: slice
    keys: slice
    hidden: Tensor | None
    """(lanes, rows, n) bool: which of the first n keys lie before the document of a query; None where none do."""


def _tiles(q: Tensor, k: Tensor, window: int | None, document_start: Tensor | None) -> Iterator[_Tile]:
    """The tiles of some lanes, from the first queries to the last."""
    length, past, rows = q.shape[3], k.shape[2] - q.shape[3], _rows(q.device)
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        first, hidden = 0 if window is None else max(0, past + start - window + 1), None
        if document_start is not None:
            first, hidden = _hide_earlier_documents(document_start[:, start:stop], first, past + stop)
        yield _Tile(slice(start, stop), slice(first, past + stop), hidden)


def _hide_earlier_documents(starts: Tensor, first: int, last: int) -> tuple[int, Tensor | None]:
    """The first key of a tile, ``first`` or a later one, and its ``hidden``.

    ``starts`` (lanes, rows) are the document starts of the tile, whose keys end at ``last``. On a CPU the keys
    before all starts are left out and those after all starts are not masked; elsewhere reading the starts would wait
    for the device.
    """
    if starts.device.type == "cpu":
        first, last = max(first, int(starts[:, 0].amin())), int(starts[:, -1].amax())
    if last <= first:
        return first, None
    return first, torch.arange(first, last, device=starts.device) < starts.unsqueeze(-1)


def _softmax_maps(q: Tensor, k: Tensor, window: int | None, hidden: Tensor | None) -> Tensor:
    """Maps (lanes, maps, group*rows, keys) of one tile, whose last query sits at its last key.

    q (lanes, maps, group, rows, d) already scaled, k (lanes, maps, keys, d), ``hidden`` of the tile. Only the edges
    of the visible band cross the tile, so only they are masked, rather than every element.
    """
    lanes, maps, group, rows, _ = q.shape
    keys = k.shape[2]
    scores = wide_bmm(q.flatten(2, 3).flatten(0, 1), k.flatten(0, 1).mT).view(lanes, maps, group, rows, keys)
    scores[..., -rows:] += scores.new_full((rows, rows), -torch.inf).triu_(1)
    forgotten = 0 if window is None else keys - window
    if forgotten > 0:
        scores[..., :forgotten] += scores.new_full((rows, forgotten), -torch.inf).tril_(forgotten - rows)
    if hidden is not None:
        scores[..., : hidden.shape[-1]].masked_fill_(hidden[:, None, None], -torch.inf)
    return scores.softmax(dim=-1).view(lanes, maps, group * rows, keys)


def _subtract(maps: Tensor, lam: Tensor | None) -> Tensor:
    """(lanes, maps, m, n) to the one map (lanes, m, n) that multiplies the values."""
    if lam is None:
        return maps.squeeze(1)
    return torch.addcmul(maps[:, 0], maps[:, 1], lam.to(maps.dtype), value=-1)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    document_start: Tensor | None = None,
    *,
    lam: Tensor | None,
    window: int | None,
) -> None:
    """Fill ``output`` for some lanes."""
    scale = q.shape[-1] ** -0.5
    for queries, keys, hidden in _tiles(q, k, window, document_start):
        maps = _softmax_maps(q[..., queries, :] * scale, k[:, :, keys], window, hidden)
        block = wide_bmm(_subtract(maps, lam).to(v.dtype), v[:, keys])
        output[:, :, queries] = torch.unflatten(block, 1, (q.shape[2], -1))


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    upstream: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    document_start: Tensor | None = None,
    *,
    lam: Tensor | None,
    grad_lam: Tensor | None,
    window: int | None,
) -> None:
    """Fill ``grad_q`` and add to the other gradients for some lanes, from ``upstream`` = dL/d output."""
    scale = q.shape[-1] ** -0.5
    for queries, keys, hidden in _tiles(q, k, window, document_start):
        block = q[..., queries, :] * scale
        grad_block = upstream[:, :, queries].flatten(1, 2)
        maps = _softmax_maps(block, k[:, :, keys], window, hidden)
        accumulate_bmm_(grad_v[:, keys], _subtract(maps, lam).to(v.dtype).mT, grad_block)
        grad_scores, row_sums = _softmax_backward(maps, wide_bmm(grad_block, v[:, keys].mT))
        if lam is not None and grad_lam is not None:
            grad_lam.sub_(row_sums[:, 1].sum())
            grad_scores[:, 1].mul_(-lam.to(grad_scores.dtype))
        grad_scores = grad_scores.to(k.dtype).flatten(0, 1)
        grad_queries = wide_bmm(grad_scores, k[:, :, keys].flatten(0, 1)).mul_(scale)
        grad_q[..., queries, :] = grad_queries.view(block.shape)
        accumulate_bmm_(grad_k.flatten(0, 1)[:, keys], grad_scores.mT, block.flatten(2, 3).flatten(0, 1))


def _softmax_backward(maps: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the scores, maps . (grad - row_sums), and row_sums = the sums of maps . grad over the keys.

    maps (lanes, maps, m, n), grad (lanes, m, n) of the mixed map, which all maps of a lane share.
    """
    grad_scores = maps * grad.unsqueeze(1)
    row_sums = grad_scores.sum(dim=-1, keepdim=True)
    return grad_scores.addcmul_(maps, row_sums, value=-1), row_sums
