"""Exact causal softmax attention tile by tile, with memory linear in the sequence length.

A tile is a block of queries against a block of keys, small enough to stay in cache. The forward pass walks the keys
of a block of queries once, with a softmax that is rescaled as larger scores appear, and keeps the logarithm of every
row's sum; the backward pass computes the same maps again from it. Row sums of map * gradient are those of output *
upstream gradient, so that no row is walked twice (FlashAttention-2, arXiv 2307.08691). Two maps over the same values,
A1 - lam A2, go through as one: the backward pass gets dV from one product and shares dP = dO V^T between the maps, 10 d
multiplications per element of a pair of maps, where two separate attentions need 14 d. For it the second output,
A2 v, is kept.

Layout inside: a lane is one (batch, value head). q (lanes, maps, group, Tq, d), k (lanes, maps, Tk, d), v
(lanes, Tk, dv), output (lanes, group, Tq, dv). The ``group`` of query heads that share a key head become rows
of one matrix product, so K and V are never repeated and their gradients sum over the group by themselves.
Where documents are kept apart, document_start (lanes, Tq) is the index of the first key of a query's document.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import accumulate_bmm_, accumulation_dtype, operand, wide_bmm

LOG2_E = math.log2(math.e)
"""Scores are taken times this and exponentials to the base 2: on a CPU, torch's natural one is 30 times slower where
its result is nearly 0, as many weights are."""


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
        queries, keys, values = _to_lanes(q, k, v)
        lanes, maps, group, length, _ = queries.shape
        output = queries.new_empty(lanes, group, length, v.shape[-1])
        second = None if lam is None else torch.empty_like(output)
        log_sums = queries.new_empty(lanes, maps, group, length, dtype=accumulation_dtype(q))
        starts = _starts_of_lanes(document_start, v)
        tensors = (queries, keys, values, output, log_sums, second, starts)
        for parts in _lane_splits(window, *tensors):
            _forward(*parts, lam=lam, window=window)
        result = output.view(q.shape[0], -1, length, v.shape[-1]).to(q.dtype)
        ctx.save_for_backward(q, k, v, lam, document_start, result, second, log_sums)
        ctx.window = window
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lam, document_start, output, second, log_sums = ctx.saved_tensors
        queries, keys, values = _to_lanes(q, k, v)
        lanes, _, group, length, _ = queries.shape
        upstream = operand(grad_output).reshape(lanes, group, length, v.shape[-1])
        row_sums = _row_sums(upstream, output.view(upstream.shape), second, lam)
        wide = accumulation_dtype(q)
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (queries, keys, values))
        starts = _starts_of_lanes(document_start, v)
        tensors = (queries, keys, values, upstream, log_sums, row_sums, grad_q, grad_k, grad_v, starts)
        for parts in _lane_splits(ctx.window, *tensors):
            _backward(*parts, lam=lam, window=ctx.window)
        grad_q = torch.unflatten(grad_q, 0, (q.shape[0], -1)).transpose(2, 3)
        grads = (grad.reshape(x.shape).to(x.dtype) for grad, x in ((grad_q, q), (grad_k, k), (grad_v, v)))
        return *grads, None if lam is None else -row_sums[:, 1].sum().to(lam.dtype), None, None


def _to_lanes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs in the layout of the module docstring, ready for matrix products."""
    groups, maps = v.shape[1], k.shape[1] // v.shape[1]
    queries = torch.unflatten(operand(q), 1, (groups, -1, maps)).transpose(2, 3)
    keys = torch.unflatten(operand(k), 1, (groups, maps))
    return queries.flatten(0, 1), keys.flatten(0, 1), operand(v).flatten(0, 1)


def _starts_of_lanes(document_start: Tensor | None, v: Tensor) -> Tensor | None:
    """document_start (B, Tq) as (lanes, Tq)."""
    return None if document_start is None else document_start.repeat_interleave(v.shape[1], dim=0)


def _row_sums(upstream: Tensor, output: Tensor, second: Tensor | None, lam: Tensor | None) -> Tensor:
    """Sums over the keys of each map times the gradient of the mixed map: (lanes, maps, group, Tq)."""
    wide = accumulation_dtype(upstream)
    mixed = (upstream.to(wide) * output).sum(-1)
    if second is None or lam is None:
        return mixed.unsqueeze(1)
    of_second = (upstream.to(wide) * second).sum(-1)
    return torch.stack([mixed + lam * of_second, of_second], dim=1)


def _block_sizes(device: torch.device, window: int | None) -> tuple[int, int]:
    """Queries and keys of a tile: few on a CPU, for tiles that stay in cache; many on a GPU, for fewer launches.

    Of the keys of a tile with a window, as many as it has queries are outside for some of them.
    """
    if device.type != "cpu":
        return 512, 4096
    return (256, 256) if window is None else (64, 1024)


def _lane_splits(window: int | None, q: Tensor, k: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The tensors cut along the lanes: the maps of a tile hold half a megabyte (on a GPU 512 MB) at most."""
    budget = 2**17 if q.device.type == "cpu" else 2**27
    rows, keys = _block_sizes(q.device, window)
    keys = keys if window is None else min(keys, window + rows)
    width = q.shape[1] * q.shape[2] * min(rows, q.shape[3]) * min(keys, k.shape[2])
    lanes = max(1, budget // width)
    for first in range(0, q.shape[0], lanes):
        yield tuple(None if x is None else x[first : first + lanes] for x in (q, k, *others))


class _Queries(NamedTuple):
    """A block of queries and the keys that hold all that any of them sees."""

    rows: slice
    position: int
    """Index among the keys of the first query's own."""
    first: int
    last: int
    starts: Tensor | None
    """(lanes, rows) document starts."""

    def blocks_of_keys(self, size: int) -> Iterator[slice]:
        """The visible keys, ``size`` at a time."""
        for first in range(self.first, self.last, size):
            yield slice(first, min(first + size, self.last))


def _blocks_of_queries(
    q: Tensor, k: Tensor, window: int | None, document_start: Tensor | None
) -> Iterator[_Queries]:
    """The queries of some lanes, from the first block to the last."""
    length, past, size = q.shape[3], k.shape[2] - q.shape[3], _block_sizes(q.device, window)[0]
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = 0 if window is None else max(0, past + start - window + 1)
        starts = None if document_start is None else document_start[:, start:stop]
        if starts is not None and starts.device.type == "cpu":  # elsewhere reading it would wait for the device
            first = max(first, int(starts[:, 0].amin()))
        yield _Queries(slice(start, stop), past + start, first, past + stop, starts)


def _scores(q: Tensor, k: Tensor, block: _Queries, keys: slice, window: int | None) -> Tensor:
    """Scores (lanes, maps, group*rows, keys) of one tile, -inf where a query does not see a key.

    q (lanes, maps, group, rows, d) already scaled, k (lanes, maps, keys, d). Only tiles that an edge of the visible
    band crosses are masked.
    """
    lanes, maps, group, rows, _ = q.shape
    count = keys.stop - keys.start
    scores = wide_bmm(q.flatten(2, 3).flatten(0, 1), k.flatten(0, 1).mT).view(lanes, maps, group, rows, count)
    own = block.position - keys.start
    if own + 1 < count:
        future = max(0, own + 1)
        edge = scores.new_full((rows, count - future), -torch.inf).triu_(own + 1 - future)
        scores[..., future:] += edge
    if window is not None and own + rows > window:
        scores += scores.new_full((rows, count), -torch.inf).tril_(own - window)
    if block.starts is not None:
        _hide_earlier_documents(scores, block.starts - keys.start)
    return scores.view(lanes, maps, group * rows, count)


def _hide_earlier_documents(scores: Tensor, starts: Tensor) -> None:
    """Mask what lies before the document of a query, whose ``starts`` (lanes, rows) count from the tile's first key.

    On a CPU the columns after all starts are left alone; elsewhere reading the starts would wait for the device.
    """
    count = scores.shape[-1]
    if starts.device.type == "cpu":
        count = min(count, int(starts[:, -1].amax()))
    if count > 0:
        hidden = torch.arange(count, device=starts.device) < starts.unsqueeze(-1)
        scores[..., :count].masked_fill_(hidden[:, None, None], -torch.inf)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    log_sums: Tensor,
    second: Tensor | None,
    document_start: Tensor | None,
    *,
    lam: Tensor | None,
    window: int | None,
) -> None:
    """Fill ``output``, ``log_sums`` and, with two maps, ``second`` = A2 v for some lanes."""
    scale, size = q.shape[-1] ** -0.5, _block_sizes(q.device, window)[1]
    for block in _blocks_of_queries(q, k, window, document_start):
        softmax = _RunningSoftmax(q[..., block.rows, 0], v)
        queries = q[..., block.rows, :] * (scale * LOG2_E)
        for keys in block.blocks_of_keys(size):
            softmax.add_(_scores(queries, k[:, :, keys], block, keys, window), v[:, keys])
        heads, log_sums[..., block.rows] = softmax.finish()
        if second is not None and lam is not None:
            second[..., block.rows, :] = heads[:, 1]
            output[..., block.rows, :] = heads[:, 0] - lam.to(heads.dtype) * heads[:, 1]
        else:
            output[..., block.rows, :] = heads[:, 0]


class _RunningSoftmax:
    """softmax(scores) v of some rows, of which the scores come a block of keys at a time."""

    def __init__(self, rows: Tensor, v: Tensor) -> None:
        """``rows`` (lanes, maps, group, rows) gives the shape alone."""
        self._shape = rows.shape
        lanes, maps, group, length = rows.shape
        shape, wide = (lanes, maps, group * length), accumulation_dtype(v)
        # Lower than every score and not -inf, of which the difference to a hidden score would not be a number.
        self._largest = v.new_full((*shape, 1), torch.finfo(wide).min, dtype=wide)
        self._sums = torch.zeros_like(self._largest)
        self._values = v.new_zeros(*shape, v.shape[-1], dtype=wide)

    def add_(self, scores: Tensor, v: Tensor) -> None:
        """Take scores (lanes, maps, m, n), which are overwritten, and their values v (lanes, n, dv)."""
        largest = torch.maximum(self._largest, scores.amax(-1, keepdim=True))
        weights = scores.sub_(largest).exp2_()
        shrink = (self._largest - largest).exp2_()
        self._largest = largest
        self._sums = self._sums.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        self._values.mul_(shrink)
        accumulate_bmm_(self._values.flatten(1, 2), weights.flatten(1, 2).to(v.dtype), v)

    def finish(self) -> tuple[Tensor, Tensor]:
        """The heads (lanes, maps, group, rows, dv) and the logarithms of the sums (lanes, maps, group, rows)."""
        heads = (self._values / self._sums).view(*self._shape, -1)
        return heads, (self._largest + self._sums.log2()).view(self._shape)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    upstream: Tensor,
    log_sums: Tensor,
    row_sums: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    document_start: Tensor | None,
    *,
    lam: Tensor | None,
    window: int | None,
) -> None:
    """Add to the gradients for some lanes, from ``upstream`` = dL/d output and what the forward pass kept."""
    scale, size = q.shape[-1] ** -0.5, _block_sizes(q.device, window)[1]
    for block in _blocks_of_queries(q, k, window, document_start):
        queries = q[..., block.rows, :] * (scale * LOG2_E)
        signed = _signed(q[..., block.rows, :] * scale, lam).flatten(2, 3).flatten(0, 1)
        grad_block = upstream[:, :, block.rows].flatten(1, 2)
        logs, sums = (x[..., block.rows].flatten(2).unsqueeze(-1) for x in (log_sums, row_sums))
        steps = torch.cat([sums[:, :1], sums.diff(dim=1)], dim=1)
        grad_queries = torch.zeros_like(signed, dtype=grad_q.dtype)
        for keys in block.blocks_of_keys(size):
            maps = _scores(queries, k[:, :, keys], block, keys, window).sub_(logs).exp2_()
            accumulate_bmm_(grad_v[:, keys], _subtract(maps, lam).to(v.dtype).mT, grad_block)
            _multiply_centred_(maps, wide_bmm(grad_block, v[:, keys].mT), steps)
            grad_scores = maps.to(k.dtype).flatten(0, 1)
            accumulate_bmm_(grad_queries, grad_scores, k[:, :, keys].flatten(0, 1))
            accumulate_bmm_(grad_k.flatten(0, 1)[:, keys], grad_scores.mT, signed)
        grad_q[..., block.rows, :] = _signed(grad_queries.view(queries.shape), lam).mul_(scale)


def _multiply_centred_(maps: Tensor, grad: Tensor, steps: Tensor) -> None:
    """Multiply each of maps (lanes, maps, m, n) by grad (lanes, m, n), which is overwritten, minus its row sums.

    ``steps`` (lanes, maps, m, 1) are the row sums of the first map, and how those of each other differ from the last.
    """
    for one, step in zip(maps.unbind(1), steps.unbind(1), strict=True):
        one.mul_(grad.sub_(step))


def _signed(x: Tensor, lam: Tensor | None) -> Tensor:
    """(lanes, maps, ...) times 1 and -lam, the weights of the maps."""
    if lam is None:
        return x
    return torch.stack([x[:, 0], x[:, 1] * -lam.to(x.dtype)], dim=1)


def _subtract(maps: Tensor, lam: Tensor | None) -> Tensor:
    """(lanes, maps, m, n) to the one map (lanes, m, n) that multiplies the values."""
    if lam is None:
        return maps.squeeze(1)
    if maps.device.type == "cpu":  # where torch does not vectorise addcmul with a broadcast operand
        return torch.sub(maps[:, 0], maps[:, 1], alpha=lam.item())
    return torch.addcmul(maps[:, 0], maps[:, 1], lam.to(maps.dtype), value=-1)
