"""Backward pass of ``attention_forward``: what rows have in common, then dK and dV, then dQ.

With P_s the softmax maps, P = P1 - lam P2 and dP = dO V^T, which both maps share:

    dV = P^T dO,  dS1 = P1 . (dP - D1),  dS2 = -lam P2 . (dP - D2),  D_s = rowsum(dO . P_s V),  dlam = -sum D2

Every gradient is summed in one program in a fixed order, so runs repeat bit for bit. The kernels for dK, dV and for
dQ therefore both make the maps and dP: 14 d multiplications per element of a pair of maps (d, dv = 2d). One kernel
would need 10 d, but its sums over the keys, dQ, would have to pass through atomic additions or wait in turn.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import keys_of_rows, load_rows, load_starts, positions_of, rows_of_keys, store_rows, visible


@triton.jit
def attention_row_sums(
    grad_ptr,
    out_ptr,
    second_ptr,
    lam_ptr,
    weight_ptr,
    grad_out_ptr,
    grad_weight_ptr,
    sums_ptr,
    grad_batch,
    grad_head,
    grad_token,
    out_batch,
    out_head,
    out_token,
    heads,
    lanes,
    length,
    eps,
    norm_scale,
    MAPS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """``sums`` (MAPS, lanes, length) fp32: D1 and D2 of ROWS queries of a lane; grid (query blocks * lanes,).

    ``out`` is the output, ``second`` that of the second map. With HAS_NORM, ``out`` is the output before the norm and
    the gradient of that is stored in ``grad_out``; with HAS_WEIGHT each program stores its share of the weight's
    gradient in a row of ``grad_weight`` (programs, DV) fp32. All but ``grad`` have the strides of ``out``.
    """
    blocks = tl.cdiv(length, ROWS)
    first = tl.program_id(0) % blocks * ROWS
    lane = (tl.program_id(0) // blocks).to(tl.int64)
    batch = lane // heads
    head = lane % heads
    rows = first + tl.arange(0, ROWS)
    inside = rows < length
    offset = batch * out_batch + head * out_head
    grad_base = grad_ptr + batch * grad_batch + head * grad_head
    grad = load_rows(grad_base, first, length, grad_token, ROWS, DV, BLOCK_DV, True).to(tl.float32)
    out = load_rows(out_ptr + offset, first, length, out_token, ROWS, DV, BLOCK_DV, True).to(tl.float32)
    if HAS_NORM:
        # Rows after the last query would divide by a root of zero where eps is zero.
        mean_square = tl.where(inside, tl.sum(out * out, 1) / DV, 1.0)
        inverse = tl.rsqrt(mean_square + eps)
        unit = out * inverse[:, None]
        if HAS_WEIGHT:
            columns = tl.arange(0, BLOCK_DV)
            share = tl.sum(grad * unit, 0) * norm_scale
            share_ptr = grad_weight_ptr + tl.program_id(0).to(tl.int64) * DV
            tl.store(share_ptr + columns, share, mask=columns < DV)
            grad *= tl.load(weight_ptr + columns, mask=columns < DV, other=0.0).to(tl.float32)[None, :]
        along = tl.sum(grad * unit, 1) / DV
        grad = (grad - unit * along[:, None]) * (inverse * norm_scale)[:, None]
        store_rows(grad_out_ptr + offset, grad, first, length, out_token, ROWS, DV, BLOCK_DV)
        # The other kernels read the rounded gradient: the rows of dS sum to zero with its sums alone.
        grad = grad.to(grad_out_ptr.dtype.element_ty).to(tl.float32)
    sums = tl.sum(grad * out, 1)
    if MAPS == 2:
        second = load_rows(second_ptr + offset, first, length, out_token, ROWS, DV, BLOCK_DV, True).to(tl.float32)
        sums2 = tl.sum(grad * second, 1)
        # The first map's output is out + lam second.
        sums += tl.load(lam_ptr).to(tl.float32) * sums2
        tl.store(sums_ptr + (lanes + lane) * length + rows, sums2, mask=inside)
    tl.store(sums_ptr + lane * length + rows, sums, mask=inside)


@triton.jit
def attention_backward_kv(
    q_ptr,
    k_ptr,
    v_ptr,
    lam_ptr,
    starts_ptr,
    ends_ptr,
    grad_ptr,
    lse_ptr,
    sums_ptr,
    dk_ptr,
    dv_ptr,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    grad_batch,
    grad_head,
    grad_token,
    dk_batch,
    dk_head,
    dk_token,
    dv_batch,
    dv_head,
    dv_token,
    batches,
    groups,
    length_q,
    length_k,
    window,
    scale,
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
):
    """dK and dV of a block of KEYS keys of one (batch, value head), summed over its GROUP; grid (key blocks * those,).

    ``ends`` (2, batches, key blocks) int64 counts the queries whose documents start no later than the last and the
    first key of a block. The maps are held transposed, (keys, queries), as both products take them.
    """
    blocks = tl.cdiv(length_k, KEYS)
    block = tl.program_id(0) % blocks
    first = block * KEYS
    lane = (tl.program_id(0) // blocks).to(tl.int64)
    batch = lane // groups
    value_head = lane % groups
    k_base = k_ptr + batch * k_batch + value_head * MAPS * k_head
    v_base = v_ptr + batch * v_batch + value_head * v_head
    end_of_last = length_q + first * 0
    end_of_first = length_q + first * 0
    if HAS_DOCUMENTS:
        starts_ptr += batch * length_q
        end_of_last = tl.load(ends_ptr + batch * blocks + block).to(tl.int32)
        end_of_first = tl.load(ends_ptr + (batches + batch) * blocks + block).to(tl.int32)
    begin, full_begin, full_end, end = rows_of_keys(
        first, end_of_last, end_of_first, length_q, length_k, window, ROWS, KEYS, HAS_WINDOW
    )

    v = load_rows(v_base, first, length_k, v_token, KEYS, DV, BLOCK_DV, True)
    k1 = load_rows(k_base, first, length_k, k_token, KEYS, D, BLOCK_D, True)
    dv = tl.zeros([KEYS, BLOCK_DV], tl.float32)
    dk1 = tl.zeros([KEYS, BLOCK_D], tl.float32)
    k2 = k1
    dk2 = tl.zeros([KEYS, BLOCK_D], tl.float32)
    lam = 0.0
    if MAPS == 2:
        k2 = load_rows(k_base + k_head, first, length_k, k_token, KEYS, D, BLOCK_D, True)
        lam = tl.load(lam_ptr).to(tl.float32)

    lanes = batches * groups * GROUP
    for member in range(0, GROUP):
        head = value_head * GROUP + member
        q_base = q_ptr + batch * q_batch + head * MAPS * q_head
        grad_base = grad_ptr + batch * grad_batch + head * grad_head
        row_offset = (batch * groups * GROUP + head) * length_q
        map_offset = tl.cast(lanes, tl.int64) * length_q
        dk1, dk2, dv = _accumulate_kv(
            dk1, dk2, dv, k1, k2, v, lam, q_base, q_head, q_token, grad_base, grad_token, lse_ptr + row_offset,
            sums_ptr + row_offset, map_offset, starts_ptr, begin, full_begin, first, length_q, length_k, window, scale,
            MAPS, D, DV, BLOCK_D, BLOCK_DV, ROWS, KEYS, HAS_WINDOW, HAS_DOCUMENTS, True,
        )  # fmt: skip
        dk1, dk2, dv = _accumulate_kv(
            dk1, dk2, dv, k1, k2, v, lam, q_base, q_head, q_token, grad_base, grad_token, lse_ptr + row_offset,
            sums_ptr + row_offset, map_offset, starts_ptr, full_begin, full_end, first, length_q, length_k, window,
            scale, MAPS, D, DV, BLOCK_D, BLOCK_DV, ROWS, KEYS, HAS_WINDOW, HAS_DOCUMENTS, False,
        )  # fmt: skip
        dk1, dk2, dv = _accumulate_kv(
            dk1, dk2, dv, k1, k2, v, lam, q_base, q_head, q_token, grad_base, grad_token, lse_ptr + row_offset,
            sums_ptr + row_offset, map_offset, starts_ptr, full_end, end, first, length_q, length_k, window, scale,
            MAPS, D, DV, BLOCK_D, BLOCK_DV, ROWS, KEYS, HAS_WINDOW, HAS_DOCUMENTS, True,
        )  # fmt: skip

    dk_base = dk_ptr + batch * dk_batch + value_head * MAPS * dk_head
    store_rows(dk_base, dk1 * scale, first, length_k, dk_token, KEYS, D, BLOCK_D)
    if MAPS == 2:
        store_rows(dk_base + dk_head, dk2 * scale, first, length_k, dk_token, KEYS, D, BLOCK_D)
    dv_base = dv_ptr + batch * dv_batch + value_head * dv_head
    store_rows(dv_base, dv, first, length_k, dv_token, KEYS, DV, BLOCK_DV)


@triton.jit
def _accumulate_kv(
    dk1,
    dk2,
    dv,
    k1,
    k2,
    v,
    lam,
    q_base,
    q_head,
    q_token,
    grad_base,
    grad_token,
    lse_base,
    sums_base,
    map_offset,
    starts_ptr,
    begin,
    end,
    first,
    length_q,
    length_k,
    window,
    scale,
    MAPS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dK and dV after the queries from ``begin`` to ``end`` of one head; not yet scaled."""
    log2_scale = scale * 1.4426950408889634
    keys = first + tl.arange(0, KEYS)
    for m in range(begin, end, ROWS):
        rows = m + tl.arange(0, ROWS)
        grad = load_rows(grad_base, m, length_q, grad_token, ROWS, DV, BLOCK_DV, MASKED)
        q1 = load_rows(q_base, m, length_q, q_token, ROWS, D, BLOCK_D, MASKED)
        seen = keys[:, None] >= 0
        if MASKED:
            starts = load_starts(starts_ptr, m, length_q, ROWS, HAS_DOCUMENTS)
            positions = positions_of(rows, length_q, length_k)
            seen = visible(positions[None, :], keys[:, None], starts[None, :], window, HAS_WINDOW, HAS_DOCUMENTS)
        dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
        weights = _weights(k1, q1, _load_row(lse_base, rows, length_q, MASKED)[None, :], seen, log2_scale, MASKED)
        ds = weights * (dp - _load_row(sums_base, rows, length_q, MASKED)[None, :])
        dk1 = tl.dot(ds.to(q1.dtype), q1, dk1, input_precision="ieee")
        if MAPS == 2:
            q2 = load_rows(q_base + q_head, m, length_q, q_token, ROWS, D, BLOCK_D, MASKED)
            lse2 = _load_row(lse_base + map_offset, rows, length_q, MASKED)
            weights2 = lam * _weights(k2, q2, lse2[None, :], seen, log2_scale, MASKED)
            ds2 = weights2 * (_load_row(sums_base + map_offset, rows, length_q, MASKED)[None, :] - dp)
            dk2 = tl.dot(ds2.to(q2.dtype), q2, dk2, input_precision="ieee")
            weights -= weights2
        dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="ieee")
    return dk1, dk2, dv


@triton.jit
def attention_backward_q(
    q_ptr,
    k_ptr,
    v_ptr,
    lam_ptr,
    starts_ptr,
    grad_ptr,
    lse_ptr,
    sums_ptr,
    dq_ptr,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    grad_batch,
    grad_head,
    grad_token,
    dq_batch,
    dq_head,
    dq_token,
    heads,
    lanes,
    length_q,
    length_k,
    window,
    scale,
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
):
    """dQ of a block of ROWS queries of one lane = (batch, head); grid (query blocks * lanes,)."""
    blocks = tl.cdiv(length_q, ROWS)
    # The last queries see the most keys, so they begin first.
    first = (blocks - 1 - tl.program_id(0) % blocks) * ROWS
    lane = (tl.program_id(0) // blocks).to(tl.int64)
    batch = lane // heads
    head = lane % heads
    q_base = q_ptr + batch * q_batch + head * MAPS * q_head
    k_base = k_ptr + batch * k_batch + head // GROUP * MAPS * k_head
    v_base = v_ptr + batch * v_batch + head // GROUP * v_head
    grad_base = grad_ptr + batch * grad_batch + head * grad_head
    rows = first + tl.arange(0, ROWS)
    positions = positions_of(rows, length_q, length_k)
    if HAS_DOCUMENTS:
        starts_ptr += batch * length_q
    starts = load_starts(starts_ptr, first, length_q, ROWS, HAS_DOCUMENTS)
    lse_base = lse_ptr + lane * length_q
    sums_base = sums_ptr + lane * length_q

    grad = load_rows(grad_base, first, length_q, grad_token, ROWS, DV, BLOCK_DV, True)
    q1 = load_rows(q_base, first, length_q, q_token, ROWS, D, BLOCK_D, True)
    lse1 = _load_row(lse_base, rows, length_q, True)
    rowsum1 = _load_row(sums_base, rows, length_q, True)
    dq1 = tl.zeros([ROWS, BLOCK_D], tl.float32)
    q2 = q1
    lse2 = lse1
    rowsum2 = rowsum1
    dq2 = tl.zeros([ROWS, BLOCK_D], tl.float32)
    lam = 0.0
    if MAPS == 2:
        map_offset = tl.cast(lanes, tl.int64) * length_q
        q2 = load_rows(q_base + q_head, first, length_q, q_token, ROWS, D, BLOCK_D, True)
        lse2 = _load_row(lse_base + map_offset, rows, length_q, True)
        rowsum2 = _load_row(sums_base + map_offset, rows, length_q, True)
        lam = tl.load(lam_ptr).to(tl.float32)

    begin, full_begin, full_end, end = keys_of_rows(
        starts_ptr, first, length_q, length_k, window, ROWS, KEYS, HAS_WINDOW, HAS_DOCUMENTS
    )
    if HAS_WINDOW or HAS_DOCUMENTS:
        dq1, dq2 = _accumulate_q(
            dq1, dq2, q1, q2, grad, lse1, lse2, rowsum1, rowsum2, lam, k_base, k_head, k_token, v_base, v_token, begin,
            full_begin, positions, starts, window, length_k, scale,
            MAPS, D, DV, BLOCK_D, BLOCK_DV, KEYS, HAS_WINDOW, HAS_DOCUMENTS, True,
        )  # fmt: skip
    dq1, dq2 = _accumulate_q(
        dq1, dq2, q1, q2, grad, lse1, lse2, rowsum1, rowsum2, lam, k_base, k_head, k_token, v_base, v_token, full_begin,
        full_end, positions, starts, window, length_k, scale,
        MAPS, D, DV, BLOCK_D, BLOCK_DV, KEYS, HAS_WINDOW, HAS_DOCUMENTS, False,
    )  # fmt: skip
    dq1, dq2 = _accumulate_q(
        dq1, dq2, q1, q2, grad, lse1, lse2, rowsum1, rowsum2, lam, k_base, k_head, k_token, v_base, v_token, full_end,
        end, positions, starts, window, length_k, scale,
        MAPS, D, DV, BLOCK_D, BLOCK_DV, KEYS, HAS_WINDOW, HAS_DOCUMENTS, True,
    )  # fmt: skip

    dq_base = dq_ptr + batch * dq_batch + head * MAPS * dq_head
    store_rows(dq_base, dq1 * scale, first, length_q, dq_token, ROWS, D, BLOCK_D)
    if MAPS == 2:
        store_rows(dq_base + dq_head, dq2 * scale, first, length_q, dq_token, ROWS, D, BLOCK_D)


@triton.jit
def _accumulate_q(
    dq1,
    dq2,
    q1,
    q2,
    grad,
    lse1,
    lse2,
    rowsum1,
    rowsum2,
    lam,
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
    scale,
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
    """dQ of both maps after the keys from ``begin`` to ``end``; not yet scaled."""
    log2_scale = scale * 1.4426950408889634
    for n in range(begin, end, KEYS):
        v = load_rows(v_base, n, length_k, v_token, KEYS, DV, BLOCK_DV, MASKED)
        k1 = load_rows(k_base, n, length_k, k_token, KEYS, D, BLOCK_D, MASKED)
        keys = n + tl.arange(0, KEYS)
        seen = keys[None, :] >= 0
        if MASKED:
            seen = visible(positions[:, None], keys[None, :], starts[:, None], window, HAS_WINDOW, HAS_DOCUMENTS)
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        ds = _weights(q1, k1, lse1[:, None], seen, log2_scale, MASKED) * (dp - rowsum1[:, None])
        dq1 = tl.dot(ds.to(k1.dtype), k1, dq1, input_precision="ieee")
        if MAPS == 2:
            k2 = load_rows(k_base + k_head, n, length_k, k_token, KEYS, D, BLOCK_D, MASKED)
            ds2 = lam * _weights(q2, k2, lse2[:, None], seen, log2_scale, MASKED) * (rowsum2[:, None] - dp)
            dq2 = tl.dot(ds2.to(k2.dtype), k2, dq2, input_precision="ieee")
    return dq1, dq2


@triton.jit
def _weights(left, right, lse, seen, log2_scale, MASKED: tl.constexpr):
    """The softmax of left right^T, from ``lse`` of the queries, which broadcasts along the keys."""
    weights = tl.exp2(tl.dot(left, tl.trans(right), input_precision="ieee") * log2_scale - lse)
    if MASKED:
        # Chosen after the exponential, which may be infinite where nothing is seen.
        weights = tl.where(seen, weights, 0.0)
    return weights


@triton.jit
def _load_row(base_ptr, rows, length, EDGE: tl.constexpr):
    """One fp32 per query; 0 after the last one, with EDGE."""
    return tl.load(base_ptr + rows, mask=rows < length, other=0.0) if EDGE else tl.load(base_ptr + rows)
