"""Forward pass of softmax attention with one map, or with the difference of two, per value head.

A program takes a block of queries of one head and streams the keys and values that they see once, with an online
softmax per map (arXiv 2205.14135); both maps use the same block of values. Scores are in units of log 2, because the
hardware's exponential is exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import keys_of_rows, load_rows, load_starts, positions_of, store_rows, visible


@triton.jit
def attention_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    lam_ptr,
    starts_ptr,
    weight_ptr,
    out_ptr,
    raw_ptr,
    second_ptr,
    lse_ptr,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    out_batch,
    out_head,
    out_token,
    heads,
    lanes,
    length_q,
    length_k,
    window,
    scale,
    eps,
    norm_scale,
    GROUP: tl.constexpr,
    MAPS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SAVE: tl.constexpr,
):
    """``out`` of one block of ROWS queries of one lane = (batch, head); grid (query blocks * lanes,).

    With SAVE also what the backward pass needs: ``lse`` (MAPS, lanes, length_q) fp32 in units of log 2, the second
    map's output ``second`` and, with HAS_NORM, the output before the norm, ``raw``. These have the strides of ``out``.
    """
    blocks = tl.cdiv(length_q, ROWS)
    # The last queries see the most keys, so they begin first.
    first = (blocks - 1 - tl.program_id(0) % blocks) * ROWS
    lane = (tl.program_id(0) // blocks).to(tl.int64)
    batch = lane // heads
    head = lane % heads
    q_base = q_ptr + batch * q_batch + head * MAPS * q_head
    k_base = k_ptr + batch * k_batch + head // GROUP * MAPS * k_head
    v_base = v_ptr + batch * v_batch + head // GROUP * v_head
    out_offset = batch * out_batch + head * out_head
    rows = first + tl.arange(0, ROWS)
    positions = positions_of(rows, length_q, length_k)
    if HAS_DOCUMENTS:
        starts_ptr += batch * length_q
    starts = load_starts(starts_ptr, first, length_q, ROWS, HAS_DOCUMENTS)

    q1 = load_rows(q_base, first, length_q, q_token, ROWS, D, BLOCK_D, True)
    top1 = tl.full([ROWS], float("-inf"), tl.float32)
    sum1 = tl.zeros([ROWS], tl.float32)
    acc1 = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    q2 = q1
    if MAPS == 2:
        q2 = load_rows(q_base + q_head, first, length_q, q_token, ROWS, D, BLOCK_D, True)
    top2 = tl.full([ROWS], float("-inf"), tl.float32)
    sum2 = tl.zeros([ROWS], tl.float32)
    acc2 = tl.zeros([ROWS, BLOCK_DV], tl.float32)

    begin, full_begin, full_end, end = keys_of_rows(
        starts_ptr, first, length_q, length_k, window, ROWS, KEYS, HAS_WINDOW, HAS_DOCUMENTS
    )
    log2_scale = scale * 1.4426950408889634
    if HAS_WINDOW or HAS_DOCUMENTS:
        top1, sum1, acc1, top2, sum2, acc2 = _attend(
            top1, sum1, acc1, top2, sum2, acc2, q1, q2, k_base, k_head, k_token, v_base, v_token, begin, full_begin,
            positions, starts, window, length_k, log2_scale,
            MAPS, D, DV, BLOCK_D, BLOCK_DV, KEYS, HAS_WINDOW, HAS_DOCUMENTS, True,
        )  # fmt: skip
    top1, sum1, acc1, top2, sum2, acc2 = _attend(
        top1, sum1, acc1, top2, sum2, acc2, q1, q2, k_base, k_head, k_token, v_base, v_token, full_begin, full_end,
        positions, starts, window, length_k, log2_scale,
        MAPS, D, DV, BLOCK_D, BLOCK_DV, KEYS, HAS_WINDOW, HAS_DOCUMENTS, False,
    )  # fmt: skip
    top1, sum1, acc1, top2, sum2, acc2 = _attend(
        top1, sum1, acc1, top2, sum2, acc2, q1, q2, k_base, k_head, k_token, v_base, v_token, full_end, end,
        positions, starts, window, length_k, log2_scale,
        MAPS, D, DV, BLOCK_D, BLOCK_DV, KEYS, HAS_WINDOW, HAS_DOCUMENTS, True,
    )  # fmt: skip

    # Rows after the last query have sums of zero, which must not divide.
    sum1 = tl.where(sum1 > 0, sum1, 1.0)
    output = acc1 / sum1[:, None]
    if SAVE:
        tl.store(lse_ptr + lane * length_q + rows, top1 + tl.log2(sum1), mask=rows < length_q)
    if MAPS == 2:
        sum2 = tl.where(sum2 > 0, sum2, 1.0)
        second = acc2 / sum2[:, None]
        output -= tl.load(lam_ptr).to(tl.float32) * second
        if SAVE:
            tl.store(lse_ptr + (lanes + lane) * length_q + rows, top2 + tl.log2(sum2), mask=rows < length_q)
            store_rows(second_ptr + out_offset, second, first, length_q, out_token, ROWS, DV, BLOCK_DV)
    if HAS_NORM:
        if SAVE:
            store_rows(raw_ptr + out_offset, output, first, length_q, out_token, ROWS, DV, BLOCK_DV)
        mean_square = tl.where(rows < length_q, tl.sum(output * output, 1) / DV, 1.0)
        output *= (tl.rsqrt(mean_square + eps) * norm_scale)[:, None]
        if HAS_WEIGHT:
            columns = tl.arange(0, BLOCK_DV)
            output *= tl.load(weight_ptr + columns, mask=columns < DV, other=0.0).to(tl.float32)[None, :]
    store_rows(out_ptr + out_offset, output, first, length_q, out_token, ROWS, DV, BLOCK_DV)


@triton.jit
def _attend(
    top1,
    sum1,
    acc1,
    top2,
    sum2,
    acc2,
    q1,
    q2,
    k_base,
    k_head,
    k_token,
    v_base,
    v_token,
    begin,
    end,
    positions,
    starts,
    window,
    length_k,
    log2_scale,
    MAPS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The softmaxes of both maps after the keys from ``begin`` to ``end``; what a second map has stays with one."""
    for n in range(begin, end, KEYS):
        v = load_rows(v_base, n, length_k, v_token, KEYS, DV, BLOCK_DV, MASKED)
        k1 = load_rows(k_base, n, length_k, k_token, KEYS, D, BLOCK_D, MASKED)
        keys = n + tl.arange(0, KEYS)
        top1, sum1, acc1 = _fold(
            top1, sum1, acc1, q1, k1, v, positions, keys, starts, window, log2_scale, HAS_WINDOW, HAS_DOCUMENTS, MASKED
        )
        if MAPS == 2:
            k2 = load_rows(k_base + k_head, n, length_k, k_token, KEYS, D, BLOCK_D, MASKED)
            top2, sum2, acc2 = _fold(
                top2, sum2, acc2, q2, k2, v, positions, keys, starts, window, log2_scale, HAS_WINDOW, HAS_DOCUMENTS,
                MASKED,
            )  # fmt: skip
    return top1, sum1, acc1, top2, sum2, acc2


@triton.jit
def _fold(
    top,
    total,
    acc,
    q,
    k,
    v,
    positions,
    keys,
    starts,
    window,
    log2_scale,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of an online softmax: ``top`` the largest score yet, ``total`` and ``acc`` the sums relative to it."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        seen = visible(positions[:, None], keys[None, :], starts[:, None], window, HAS_WINDOW, HAS_DOCUMENTS)
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * log2_scale)
    # A row that has seen nothing yet keeps -inf, and -inf - -inf would be NaN.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores * log2_scale - shift[:, None])
    kept = tl.exp2(top - shift)
    total = total * kept + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
    return new_top, total, acc
