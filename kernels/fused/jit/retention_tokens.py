"""What tokens get from the others of their chunk and from the state that passes through it."""

import triton
import triton.language as tl

from .retention_decay import counts_at, decay_between, decay_square, sums_at


@triton.jit
def mix_tokens(
    left_ptr,
    right_ptr,
    source_ptr,
    states_ptr,
    result_ptr,
    partner_ptr,
    products_ptr,
    decay_ptr,
    counts_ptr,
    left_batch,
    left_head,
    left_token,
    right_batch,
    right_head,
    right_token,
    source_batch,
    source_head,
    source_token,
    result_batch,
    result_head,
    result_token,
    partner_batch,
    partner_head,
    partner_token,
    state_row,
    state_column,
    heads,
    length,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    FIXED: tl.constexpr,
    RESETS: tl.constexpr,
    REVERSED: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """result_i = sum_j D_ij (left_i . right_j) source_j + e_i left_i state, for ROWS tokens i and BLOCK_WIDTH columns.

    j runs over the tokens of i's chunk up to i, with D_ij the decay from j to i and e_i that from the chunk's entry to
    i; or, REVERSED, over those from i on, with the decay from i to j and to the chunk's exit. So one kernel makes all
    of

                  left  right  source  state
        output     q     k      v      S_in
        dQ         dO    v      k      S_in^T     with PRODUCTS and partner q
        dV         k     q      dO     U          REVERSED
        dK         v     dO     q      U^T        REVERSED, with PRODUCTS and partner k

    With m the boundary of i's tile at which the other tiles of the chunk end (or begin), every decay from another tile
    is one from j to m times one from m to i: only the tile itself needs an exponential for each pair.

    left and right (B, H, T, INNER), source, result and partner (B, H, T, WIDTH) have the strides that are named after
    them, and 1 between the elements of a row; states are (B*H, chunks, INNER, WIDTH) with the strides ``state_row`` and
    ``state_column`` of the last two. With PRODUCTS, result_i . partner_i over these columns goes to ``products``
    (column blocks, B*H, T) before the result is rounded.
    """
    column_blocks: tl.constexpr = (WIDTH + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    inner_blocks: tl.constexpr = (INNER + BLOCK_INNER - 1) // BLOCK_INNER
    tiles_per_chunk: tl.constexpr = CHUNK // ROWS
    tiles = tl.cdiv(length, ROWS)
    column_block = tl.program_id(0) % column_blocks
    tile = (tl.program_id(0) // column_blocks % tiles).to(tl.int64)
    sequence = (tl.program_id(0) // (column_blocks * tiles)).to(tl.int64)
    batch = sequence // heads
    head = sequence % heads
    chunks = tl.cdiv(length, CHUNK)
    chunk = tile // tiles_per_chunk

    rows = tl.arange(0, ROWS)
    columns = column_block * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    left_ptr += batch * left_batch + head * left_head
    right_ptr += batch * right_batch + head * right_head
    source_ptr += batch * source_batch + head * source_head
    states_ptr += (sequence * chunks + chunk) * (INNER * WIDTH)
    decay_ptr += head if FIXED else (sequence * chunks + chunk) * CHUNK
    counts_ptr = counts_ptr + (batch * chunks + chunk) * CHUNK if RESETS else counts_ptr

    chunk_length = tl.minimum(length - chunk * CHUNK, CHUNK)
    first = tile % tiles_per_chunk * ROWS
    border = first + (ROWS - 1) if REVERSED else first - 1
    sums = sums_at(decay_ptr, first + rows, chunk_length, FIXED)
    counts = counts_at(counts_ptr, first + rows, RESETS)
    border_sum = sums_at(decay_ptr, border, chunk_length, FIXED)
    border_count = counts_at(counts_ptr, border, RESETS)

    left = load_rows(left_ptr, left_token, tile * ROWS, length, 0, INNER, ROWS, BLOCK_INNER)
    result = tl.zeros((ROWS, BLOCK_WIDTH), tl.float32)
    for block in range(inner_blocks):
        if inner_blocks == 1:
            left_block = left
        else:
            left_block = load_rows(left_ptr, left_token, tile * ROWS, length, block, INNER, ROWS, BLOCK_INNER)
        inner = block * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
        elements = inner[:, None] * state_row + columns[None, :] * state_column
        state = tl.load(states_ptr + elements, mask=(inner[:, None] < INNER) & (columns[None, :] < WIDTH), other=0.0)
        result = tl.dot(left_block, state, result, input_precision="ieee")
    if REVERSED:
        exit_sum = sums_at(decay_ptr, tl.cast(CHUNK - 1, tl.int64), chunk_length, FIXED)
        exit_count = counts_at(counts_ptr, tl.cast(CHUNK - 1, tl.int64), RESETS)
        result *= decay_between(border_sum, border_count, exit_sum, exit_count)
        begin, end = tile + 1, tl.minimum((chunk + 1) * tiles_per_chunk, tiles)
    else:
        result *= decay_between(0.0, 0, border_sum, border_count)
        begin, end = chunk * tiles_per_chunk, tile
    for other in range(begin, end):
        start = tl.cast(other, tl.int64) * ROWS
        scores = row_products(
            left, left_ptr, left_token, tile * ROWS, right_ptr, right_token, start, length, INNER, ROWS, BLOCK_INNER
        )
        other_sums = sums_at(decay_ptr, start - chunk * CHUNK + rows, chunk_length, FIXED)
        other_counts = counts_at(counts_ptr, start - chunk * CHUNK + rows, RESETS)
        if REVERSED:
            weights = decay_between(border_sum, border_count, other_sums, other_counts)
        else:
            weights = decay_between(other_sums, other_counts, border_sum, border_count)
        source = load_rows(source_ptr, source_token, start, length, column_block, WIDTH, ROWS, BLOCK_WIDTH)
        result = tl.dot((scores * weights[None, :]).to(source.dtype), source, result, input_precision="ieee")
    if REVERSED:
        result *= decay_between(sums, counts, border_sum, border_count)[:, None]
    else:
        result *= decay_between(border_sum, border_count, sums, counts)[:, None]

    scores = row_products(
        left, left_ptr, left_token, tile * ROWS, right_ptr, right_token, tile * ROWS, length, INNER, ROWS, BLOCK_INNER
    )
    scores *= decay_square(sums, counts, ROWS, REVERSED)
    source = load_rows(source_ptr, source_token, tile * ROWS, length, column_block, WIDTH, ROWS, BLOCK_WIDTH)
    result = tl.dot(scores.to(source.dtype), source, result, input_precision="ieee")

    tokens = tile * ROWS + rows
    if PRODUCTS:
        partner_ptr += batch * partner_batch + head * partner_head
        partner = load_rows(partner_ptr, partner_token, tile * ROWS, length, column_block, WIDTH, ROWS, BLOCK_WIDTH)
        sequences = tl.num_programs(0) // (column_blocks * tiles)
        products_ptr += (column_block * sequences + sequence) * length
        tl.store(products_ptr + tokens, tl.sum(result * partner, axis=1), mask=tokens < length)
    result_ptr += batch * result_batch + head * result_head
    result_rows = result_ptr + (tokens * result_token)[:, None] + columns[None, :]
    inside = (tokens < length)[:, None] & (columns < WIDTH)[None, :]
    tl.store(result_rows, result.to(result_ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_rows(
    base_ptr, token_stride, first, length, block, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """(ROWS, BLOCK) of a matrix of ``length`` rows: from row ``first`` (int64) on, columns of ``block``; 0 outside."""
    rows = tl.arange(0, ROWS)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = (first + rows < length)[:, None] & (columns < WIDTH)[None, :]
    place = base_ptr + first * token_stride + (rows * token_stride)[:, None] + columns[None, :]
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def row_products(
    left,
    left_ptr,
    left_token,
    left_first,
    right_ptr,
    right_token,
    right_first,
    length,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(ROWS, ROWS) fp32 products of rows of two matrices; ``left`` are the left rows where one block holds them.

    Several blocks go through a loop, not unrolled: each in flight twice would not fit into shared memory.
    """
    blocks: tl.constexpr = (INNER + BLOCK - 1) // BLOCK
    if blocks == 1:
        right = load_rows(right_ptr, right_token, right_first, length, 0, INNER, ROWS, BLOCK)
        return tl.dot(left, tl.trans(right), input_precision="ieee")
    else:
        scores = tl.zeros((ROWS, ROWS), tl.float32)
        for block in range(blocks):
            part = load_rows(left_ptr, left_token, left_first, length, block, INNER, ROWS, BLOCK)
            right = load_rows(right_ptr, right_token, right_first, length, block, INNER, ROWS, BLOCK)
            scores = tl.dot(part, tl.trans(right), scores, input_precision="ieee")
        return scores
