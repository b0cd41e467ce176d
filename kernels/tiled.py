"""Exact causal softmax attention tile by tile, with memory linear in the sequence length.

A tile is a block of queries against a block of keys, small enough to stay in cache. The forward pass walks the keys
of a block of queries once, with a softmax that is rescaled as larger scores appear, and keeps the logarithm of every
row's sum; the backward pass computes the same maps again from it. Row sums of map * gradient are those of output *
upstream gradient, so that no row is walked twice (FlashAttention-2, arXiv 2307.08691). Two maps over the same values,
A1 - lam A2, go through as one: the backward pass gets dV from one product and shares dP = dO V^T between the maps, 10 d
multiplications per element of a pair of maps, where two separate attentions need 14 d. For it the second output,
A2 v, is kept. Where the keys are few, a tile holds all of them: nothing is rescaled, the maps are subtracted before
their one product with the values, 4 d instead of 6 d, and the row sums of the second map are taken from the map.

Layout inside: a lane is one (batch, value head). q (lanes, maps, group, Tq, d), k (lanes, maps, Tk, d), v
(lanes, Tk, dv), output (lanes, group, Tq, dv). The ``group`` of query heads that share a key head become rows
of one matrix product, so K and V are never repeated and their gradients sum over the group by themselves.
Where documents are kept apart, document_start (lanes, Tq) is the index of the first key of a query's document.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import accumulate_bmm_, accumulation_dtype, operand, wide_bmm

LOG2_E = math.log2(math.e)
"""Scores are taken times this and exponentials to the base 2: on a CPU, torch's natural one is 30 times slower where
its result is nearly 0, as many weights are."""

WHOLE_ROWS = 2**19
"""Elements of the maps of a tile up to which it holds all keys that its queries see, on a CPU."""


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
        output = _by_tokens(queries, (lanes, group, length, v.shape[-1]))
        whole_rows = lam is None or _tile(queries, keys, window).whole_rows
        second = None if whole_rows else torch.empty_like(output)
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
        upstream, output = (operand(x).reshape(lanes, group, length, v.shape[-1]) for x in (grad_output, output))
        wide = accumulation_dtype(q)
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (queries, keys, values))
        grad_lam = None if lam is None else torch.zeros_like(log_sums[:, 1])
        starts = _starts_of_lanes(document_start, v)
        kept = (output, second, log_sums)
        tensors = (queries, keys, values, upstream, *kept, grad_q, grad_k, grad_v, grad_lam, starts)
        for parts in _lane_splits(ctx.window, *tensors):
            _backward(*parts, lam=lam, window=ctx.window)
        grad_q = torch.unflatten(grad_q, 0, (q.shape[0], -1)).transpose(2, 3)
        grads = (grad.reshape(x.shape).to(x.dtype) for grad, x in ((grad_q, q), (grad_k, k), (grad_v, v)))
        return *grads, None if grad_lam is None else grad_lam.sum().to(lam.dtype), None, None


def _to_lanes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs in the layout of the module docstring, ready for matrix products."""
    groups, maps = v.shape[1], k.shape[1] // v.shape[1]
    queries = torch.unflatten(operand(q), 1, (groups, -1, maps)).transpose(2, 3)
    keys = torch.unflatten(operand(k), 1, (groups, maps))
    return queries.flatten(0, 1), keys.flatten(0, 1), operand(v).flatten(0, 1)


def _starts_of_lanes(document_start: Tensor | None, v: Tensor) -> Tensor | None:
    """document_start (B, Tq) as (lanes, Tq)."""
    return None if document_start is None else document_start.repeat_interleave(v.shape[1], dim=0)


def _by_tokens(like: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Not yet filled, (lanes, group, T, width), of which a token's heads lie side by side, as projections want them."""
    lanes, group, length, width = shape
    return like.new_empty(length, lanes, group, width).permute(1, 2, 0, 3)


class _Tile(NamedTuple):
    """How many queries meet how many keys at once."""

    queries: int
    keys: int
    whole_rows: bool
    """Whether that is all the keys that the queries see: then their softmax is complete at once."""


def _tile(q: Tensor, k: Tensor, window: int | None) -> _Tile:
    """Few on a CPU, for tiles that stay in cache; many on a GPU, for fewer launches.

    On a CPU rows are whole while the maps of a tile hold no more than WHOLE_ROWS (2 MB). Of the keys of a tile with a
    window, as many as it has queries are outside for some of them.
    """
    queries = 512 if q.device.type != "cpu" else 128 if window is None else 64
    seen = k.shape[2] if window is None else min(k.shape[2], window + queries)
    if q.device.type != "cpu":
        return _Tile(queries, min(seen, 4096), seen <= 4096)
    if q.shape[1] * q.shape[2] * queries * seen <= WHOLE_ROWS:
        return _Tile(queries, seen, True)
    return _Tile(256, 256, False) if window is None else _Tile(64, 1024, False)


def _lane_splits(window: int | None, q: Tensor, k: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The tensors cut along the lanes: the maps of a tile hold 1 MB (on a GPU 512 MB) at most, or those of one lane."""
    budget = 2**18 if q.device.type == "cpu" else 2**27
    tile = _tile(q, k, window)
    width = q.shape[1] * q.shape[2] * min(tile.queries, q.shape[3]) * tile.keys
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
    length, past, size = q.shape[3], k.shape[2] - q.shape[3], _tile(q, k, window).queries
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = 0 if window is None else max(0, past + start - window + 1)
        starts = None if document_start is None else document_start[:, start:stop]
        if starts is not None and starts.device.type == "cpu":  # elsewhere reading it would wait for the device
            first = max(first, int(starts[:, 0].amin()))
        yield _Queries(slice(start, stop), past + start, first, past + stop, starts)


def _scores(q: Tensor, k: Tensor, block: _Queries, keys: slice, window: int | None) -> Tensor:
    """Scores (lanes*maps, group*rows, keys) of one tile, -inf where a query does not see a key.

    q (lanes*maps, group*rows, d) already scaled, k (lanes*maps, Tk, d). Only tiles that an edge of the visible band
    crosses are masked.
    """
    scores = wide_bmm(q, k[:, keys].mT)
    rows, count = block.rows.stop - block.rows.start, keys.stop - keys.start
    own = block.position - keys.start
    if own + 1 < count:
        future = max(0, own + 1)
        edge = _infinite_above(rows, count - future, own + 1 - future, scores.dtype, scores.device)
        scores.view(-1, rows, count)[..., future:].add_(edge)
    if window is not None and own + rows > window:
        scores.view(-1, rows, count).add_(scores.new_full((rows, count), -torch.inf).tril_(own - window))
    if block.starts is not None:
        _hide_earlier_documents(scores.view(block.starts.shape[0], -1, rows, count), block.starts - keys.start)
    return scores


@lru_cache(maxsize=8)
def _infinite_above(rows: int, columns: int, diagonal: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns) of 0 below ``diagonal`` and -inf from it on: the same one in every block of queries."""
    return torch.full((rows, columns), -torch.inf, dtype=dtype, device=device).triu_(diagonal)


def _hide_earlier_documents(scores: Tensor, starts: Tensor) -> None:
    """Mask what lies before a query's document in scores (lanes, heads, rows, keys).

    The ``starts`` (lanes, rows) of the documents count from the tile's first key.

    On a CPU the columns after all starts are left alone; elsewhere reading the starts would wait for the device.
    """
    count = scores.shape[-1]
    if starts.device.type == "cpu":
        count = min(count, int(starts[:, -1].amax()))
    if count > 0:
        hidden = torch.arange(count, device=starts.device) < starts.unsqueeze(-1)
        scores[..., :count].masked_fill_(hidden.unsqueeze(1), -torch.inf)


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
    """Fill ``output``, ``log_sums`` and, with two maps whose rows are not whole, ``second`` = A2 v for some lanes."""
    tile, scale, keys_of_maps = _tile(q, k, window), q.shape[-1] ** -0.5 * LOG2_E, k.flatten(0, 1)
    for block in _blocks_of_queries(q, k, window, document_start):
        queries = (q[..., block.rows, :] * scale).flatten(2, 3).flatten(0, 1)
        outputs, logs = output[:, :, block.rows], log_sums[..., block.rows]
        if tile.whole_rows:
            keys = slice(block.first, block.last)
            maps = _softmax_(_scores(queries, keys_of_maps, block, keys, window), logs)
            mixed = _subtract(maps.view(*q.shape[:2], *maps.shape[1:]).unbind(1), lam)
            outputs.copy_(wide_bmm(mixed.to(v.dtype), v[:, keys]).view(outputs.shape))
            continue
        softmax = _RunningSoftmax(logs, v)
        for keys in block.blocks_of_keys(tile.keys):
            softmax.add_(_scores(queries, keys_of_maps, block, keys, window), v[:, keys])
        heads = softmax.finish(logs)
        if second is not None and lam is not None:
            second[:, :, block.rows] = heads[:, 1]
            outputs.copy_(heads[:, 0] - lam.to(heads.dtype) * heads[:, 1])
        else:
            outputs.copy_(heads[:, 0])


def _softmax_(scores: Tensor, log_sums: Tensor) -> Tensor:
    """The maps of whole rows, in place of their scores (lanes*maps, m, n); fills ``log_sums`` (lanes, maps, ...)."""
    largest = scores.amax(-1, keepdim=True)
    sums = scores.sub_(largest).exp2_().sum(-1, keepdim=True)
    log_sums.copy_(largest.add_(sums.log2()).view(log_sums.shape))
    return scores.mul_(sums.reciprocal_())


class _RunningSoftmax:
    """softmax(scores) v of some rows, of which the scores come a block of keys at a time."""

    def __init__(self, rows: Tensor, v: Tensor) -> None:
        """``rows`` (lanes, maps, group, rows) gives the shape alone."""
        self._shape = rows.shape
        lanes, maps, group, length = rows.shape
        shape, wide = (lanes * maps, group * length), accumulation_dtype(v)
        # Lower than every score and not -inf, of which the difference to a hidden score would not be a number.
        self._largest = v.new_full((*shape, 1), torch.finfo(wide).min, dtype=wide)
        self._sums = torch.zeros_like(self._largest)
        self._values = v.new_zeros(*shape, v.shape[-1], dtype=wide)

    def add_(self, scores: Tensor, v: Tensor) -> None:
        """Take scores (lanes*maps, m, n), which are overwritten, and their values v (lanes, n, dv)."""
        largest = torch.maximum(self._largest, scores.amax(-1, keepdim=True))
        weights = scores.sub_(largest).exp2_()
        shrink = (self._largest - largest).exp2_()
        self._largest = largest
        self._sums = self._sums.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        values = self._values.mul_(shrink).view(v.shape[0], -1, v.shape[2])
        accumulate_bmm_(values, weights.view(v.shape[0], -1, v.shape[1]).to(v.dtype), v)

    def finish(self, log_sums: Tensor) -> Tensor:
        """The heads (lanes, maps, group, rows, dv); fills ``log_sums`` (lanes, maps, group, rows)."""
        log_sums.copy_((self._largest + self._sums.log2()).view(self._shape))
        return (self._values / self._sums).view(*self._shape, -1)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    upstream: Tensor,
    output: Tensor,
    second: Tensor | None,
    log_sums: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_lam: Tensor | None,
    document_start: Tensor | None,
    *,
    lam: Tensor | None,
    window: int | None,
) -> None:
    """Add to the gradients for some lanes, from ``upstream`` = dL/d output and what the forward pass kept."""
    size, scale = _tile(q, k, window).keys, q.shape[-1] ** -0.5
    weights = _weights(lam, q) * scale
    keys_of_maps, grad_keys = k.flatten(0, 1), grad_k.flatten(0, 1)
    for block in _blocks_of_queries(q, k, window, document_start):
        rows = q[..., block.rows, :]
        queries, signed = ((rows * x).flatten(2, 3).flatten(0, 1) for x in (scale * LOG2_E, weights.to(q.dtype)))
        grad_rows, kept = (x[:, :, block.rows].flatten(1, 2) for x in (upstream, output))
        logs = log_sums[..., block.rows].reshape(*queries.shape[:2], 1)
        sums = _row_sums(grad_rows, kept)
        of_second = None if second is None else _row_sums(grad_rows, second[:, :, block.rows].flatten(1, 2))
        grad_queries = torch.zeros_like(signed, dtype=grad_q.dtype)
        for keys in block.blocks_of_keys(size):
            maps = _scores(queries, keys_of_maps, block, keys, window).sub_(logs).exp2_()
            each = maps.view(*q.shape[:2], *maps.shape[1:]).unbind(1)
            accumulate_bmm_(grad_v[:, keys], _subtract(each, lam).to(v.dtype).mT, grad_rows)
            grad = wide_bmm(grad_rows, v[:, keys].mT)
            if lam is not None and of_second is None:
                of_second = _row_sums(grad, each[1])
            _multiply_centred_(each, grad, sums, of_second, lam)
            grad_scores = maps.to(k.dtype)
            accumulate_bmm_(grad_queries, grad_scores, keys_of_maps[:, keys])
            accumulate_bmm_(grad_keys[:, keys], grad_scores.mT, signed)
        torch.mul(grad_queries.view(rows.shape), weights, out=grad_q[..., block.rows, :])
        if grad_lam is not None and of_second is not None:
            grad_lam[..., block.rows] = -of_second.view(rows.shape[0], *rows.shape[2:4])


def _row_sums(x: Tensor, y: Tensor) -> Tensor:
    """Sums of x * y (lanes, m, n) over the rows, (lanes, m, 1), in the accumulation dtype."""
    wide = accumulation_dtype(x)
    sums: Tensor = torch.linalg.vecdot(x.to(wide), y.to(wide))
    return sums.unsqueeze(-1)


def _multiply_centred_(
    maps: Sequence[Tensor], grad: Tensor, sums: Tensor, of_second: Tensor | None, lam: Tensor | None
) -> None:
    """Multiply each of maps (lanes, m, n) by grad (lanes, m, n), which is overwritten, minus its row sums.

    Those of map * grad are ``of_second`` for the second map and, ``sums`` being those of the mixed map,
    sums + lam of_second for the first.
    """
    if of_second is None or lam is None:
        maps[0].mul_(grad.sub_(sums))
        return
    of_first = sums + lam * of_second
    maps[0].mul_(grad.sub_(of_first))
    maps[1].mul_(grad.sub_(of_second - of_first))


def _weights(lam: Tensor | None, q: Tensor) -> Tensor:
    """1 and -lam, the weights of the maps, (maps, 1, 1, 1) in the accumulation dtype."""
    one = torch.ones(1, 1, 1, 1, dtype=accumulation_dtype(q), device=q.device)
    return one if lam is None else torch.cat([one, -lam.to(one.dtype).view(one.shape)])


def _subtract(maps: Sequence[Tensor], lam: Tensor | None) -> Tensor:
    """The one map (lanes, m, n) that multiplies the values."""
    if lam is None:
        return maps[0]
    if maps[0].device.type == "cpu":  # where torch does not vectorise addcmul with a broadcast operand
        return torch.sub(maps[0], maps[1], alpha=lam.item())
    return torch.addcmul(maps[0], maps[1], lam.to(maps[0].dtype), value=-1)
