"""The scan of retention's states over a sequence, in order or backwards."""

import triton
import triton.language as tl

from .retention_decay import counts_at, decay_between, sums_at


@triton.jit
def scan_states(
    x_ptr,
    y_ptr,
    start_ptr,
    states_ptr,
    end_ptr,
    others_ptr,
    other_end_ptr,
    products_ptr,
    decay_ptr,
    counts_ptr,
    x_batch,
    x_head,
    x_token,
    y_batch,
    y_head,
    y_token,
    heads,
    length,
    chunks,
    DK: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FIXED: tl.constexpr,
    RESETS: tl.constexpr,
    BACKWARDS: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """One program per block (BLOCK_K, BLOCK_V) of a head's state walks the sequence in tiles of ROWS tokens.

    In order, x = k, y = v and S <- decay * S + sum_j (decay from j to the tile's end) k_j^T v_j. BACKWARDS, x = q,
    y = dO and U <- decay * U + sum_i (decay from the tile's entry to i) q_i^T dO_i, the gradient of S. The state
    before each chunk of CHUNK tokens, in the order of the walk, goes to ``states`` (B*H, chunks, DK, DV), and the
    last one to ``end`` (B*H, DK, DV); the walk starts at ``start``. With PRODUCTS, a backwards walk writes the sums
    of U * S_out over this block to ``products`` (blocks, B*H, chunks): S_out of a chunk is the one after it in
    ``others``, which the walk in order has left, and ``other_end`` for the last.

    x (B, H, T, DK) and y (B, H, T, DV) have the strides that follow them, and 1 between the elements of a row.
    """
    blocks_v: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    blocks: tl.constexpr = blocks_v * ((DK + BLOCK_K - 1) // BLOCK_K)
    block = tl.program_id(0) % blocks
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    batch = sequence // heads
    head = sequence % heads

    in_k = block // blocks_v * BLOCK_K + tl.arange(0, BLOCK_K)
    in_v = block % blocks_v * BLOCK_V + tl.arange(0, BLOCK_V)
    element = in_k[:, None] * DV + in_v[None, :]
    inside = (in_k[:, None] < DK) & (in_v[None, :] < DV)
    rows = tl.arange(0, ROWS)
    x_ptr += batch * x_batch + head * x_head
    y_ptr += batch * y_batch + head * y_head
    decay_ptr += head if FIXED else sequence * chunks * CHUNK
    counts_ptr = counts_ptr + batch * chunks * CHUNK if RESETS else counts_ptr

    state = tl.load(start_ptr + sequence * (DK * DV) + element, mask=inside, other=0.0)
    tiles_per_chunk: tl.constexpr = CHUNK // ROWS
    tiles = tl.cdiv(length, ROWS)
    for step in range(tiles):
        # In the interpreter a loop's index is an int, which has none of the methods of a tensor.
        tile = tl.cast(tiles - 1 - step if BACKWARDS else step, tl.int64)
        chunk = tile // tiles_per_chunk
        first = tile % tiles_per_chunk * ROWS
        entered = (first == CHUNK - ROWS) | (step == 0) if BACKWARDS else first == 0
        if entered:
            place = sequence * chunks + chunk
            tl.store(states_ptr + place * (DK * DV) + element, state.to(states_ptr.dtype.element_ty), mask=inside)
            if PRODUCTS:
                if step == 0:
                    leaving = tl.load(other_end_ptr + sequence * (DK * DV) + element, mask=inside, other=0.0)
                else:
                    following = others_ptr + (place + 1) * (DK * DV) + element
                    leaving = tl.load(following, mask=inside, other=0.0).to(tl.float32)
                sequences = tl.num_programs(0) // blocks
                tl.store(products_ptr + block * sequences * chunks + place, tl.sum(state * leaving))

        tokens = tile * ROWS
        present = tokens + rows < length
        # x is loaded transposed, as the left operand of the product.
        x_tile = x_ptr + tokens * x_token + (rows * x_token)[None, :] + in_k[:, None]
        y_tile = y_ptr + tokens * y_token + (rows * y_token)[:, None] + in_v[None, :]
        x = tl.load(x_tile, mask=present[None, :] & (in_k < DK)[:, None], other=0.0)
        y = tl.load(y_tile, mask=present[:, None] & (in_v < DV)[None, :], other=0.0)

        chunk_decay = decay_ptr if FIXED else decay_ptr + chunk * CHUNK
        chunk_counts = counts_ptr + chunk * CHUNK if RESETS else counts_ptr
        chunk_length = tl.minimum(length - chunk * CHUNK, CHUNK)
        sums = sums_at(chunk_decay, first + rows, chunk_length, FIXED)
        counts = counts_at(chunk_counts, first + rows, RESETS)
        entry_sum = sums_at(chunk_decay, first - 1, chunk_length, FIXED)
        entry_count = counts_at(chunk_counts, first - 1, RESETS)
        exit_sum = sums_at(chunk_decay, first + (ROWS - 1), chunk_length, FIXED)
        exit_count = counts_at(chunk_counts, first + (ROWS - 1), RESETS)
        if BACKWARDS:
            weights = decay_between(entry_sum, entry_count, sums, counts)
        else:
            weights = decay_between(sums, counts, exit_sum, exit_count)
        state *= decay_between(entry_sum, entry_count, exit_sum, exit_count)
        weighted = (x * weights[None, :]).to(y.dtype)
        state = tl.dot(weighted, y, state, input_precision="ieee")
    tl.store(end_ptr + sequence * (DK * DV) + element, state, mask=inside)
