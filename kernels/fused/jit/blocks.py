"""What the attention kernels share: blocks of rows in memory, and which keys a block of queries sees."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(
    base_ptr, first, length, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr
):
    """(ROWS, BLOCK): rows ``first`` and on of a matrix (length, WIDTH), with zeros beside its WIDTH columns.

    Without EDGE all rows are inside; with it those from ``length`` on are zeros. Offsets are 64 bits wide, because a
    token's stride times a long sequence exceeds 32.
    """
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    pointers = base_ptr + tl.cast(first, tl.int64) * stride + rows[:, None].to(tl.int64) * stride + columns[None, :]
    if EDGE:
        inside = (first + rows < length)[:, None] & (columns < WIDTH)[None, :]
        block = tl.load(pointers, mask=inside, other=0.0)
    elif WIDTH == BLOCK:
        block = tl.load(pointers)
    else:
        block = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    return block


@triton.jit
def store_rows(
    base_ptr, block, first, length, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Store what lies inside the matrix of a block as ``load_rows`` gives it, in the matrix's dtype."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    pointers = base_ptr + tl.cast(first, tl.int64) * stride + rows[:, None].to(tl.int64) * stride + columns[None, :]
    inside = (first + rows < length)[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointers, block.to(base_ptr.dtype.element_ty), mask=inside)


@triton.jit
def positions_of(rows, length_q, length_k):
    """Where the queries ``rows`` stand among the keys; -1, which sees no key, for rows after the last query."""
    return tl.where(rows < length_q, length_k - length_q + rows, -1)


@triton.jit
def visible(positions, keys, starts, window, HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr):
    """Which keys the queries at ``positions`` see: the operands broadcast, in the order that the caller needs."""
    seen = positions >= keys
    if HAS_WINDOW:
        seen = seen & (positions - keys < window)
    if HAS_DOCUMENTS:
        seen = seen & (keys >= starts)
    return seen


@triton.jit
def load_starts(starts_ptr, first, length_q, ROWS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr):
    """(ROWS,) int32: the first key of each query's document, from ``starts_ptr`` (length_q,) int64; 0 without any."""
    rows = first + tl.arange(0, ROWS)
    if HAS_DOCUMENTS:
        starts = tl.load(starts_ptr + rows, mask=rows < length_q, other=0).to(tl.int32)
    else:
        starts = tl.zeros([ROWS], tl.int32)
    return starts


@triton.jit
def keys_of_rows(
    starts_ptr,
    first,
    length_q,
    length_k,
    window,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
):
    """Key blocks for the queries from ``first`` on, as begin <= full_begin <= full_end and the first key after all.

    The bounds but the last are multiples of KEYS. All queries see all keys between full_begin and full_end; some see
    some of the others. The documents' starts do not decrease, so those of the first and the last query tell.
    """
    past = length_k - length_q
    last = tl.minimum(first + ROWS, length_q) - 1
    lowest = first * 0
    highest = first * 0
    if HAS_WINDOW:
        lowest = tl.maximum(lowest, past + first - window + 1)
        highest = tl.maximum(highest, past + last - window + 1)
    if HAS_DOCUMENTS:
        lowest = tl.maximum(lowest, tl.load(starts_ptr + first).to(tl.int32))
        highest = tl.maximum(highest, tl.load(starts_ptr + last).to(tl.int32))
    end = past + last + 1
    full_begin = tl.minimum(tl.cdiv(highest, KEYS), tl.cdiv(end, KEYS)) * KEYS
    full_end = tl.maximum((past + first + 1) // KEYS * KEYS, full_begin)
    return lowest // KEYS * KEYS, full_begin, full_end, end


@triton.jit
def rows_of_keys(
    first,
    end_of_last,
    end_of_first,
    length_q,
    length_k,
    window,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Query blocks for the keys from ``first`` on, as begin <= full_begin <= full_end and the first query after all.

    The bounds but the last are multiples of ROWS. All queries between full_begin and full_end see all keys; some of the
    others see some. ``end_of_last`` and ``end_of_first``: the queries before them have documents that start no later
    than the last and the first key of the block.
    """
    past = length_k - length_q
    last = tl.minimum(first + KEYS, length_k) - 1
    end = end_of_last
    full_end = end_of_first
    if HAS_WINDOW:
        end = tl.minimum(end, last + window - past)
        full_end = tl.minimum(full_end, first + window - past)
    begin = tl.maximum(first - past, 0) // ROWS * ROWS
    full_begin = tl.cdiv(tl.maximum(last - past, 0), ROWS)
    full_begin = tl.maximum(tl.minimum(full_begin, tl.cdiv(tl.maximum(end, 0), ROWS)) * ROWS, begin)
    full_end = tl.maximum(tl.maximum(full_end, 0) // ROWS * ROWS, full_begin)
    return begin, full_begin, full_end, end
