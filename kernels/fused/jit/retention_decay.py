"""Decays between the tokens of a chunk, for the kernels of retention.

c_i is the running sum of the log-decays from the start of the chunk up to row i, and r_i the number of resets; both
are 0 before the first row, which is row -1 here. From row j to a later row i the decay is exp(c_i - c_j), or 0 where
r_i differs from r_j. A fixed decay has no table: c_i is (i + 1) log(gamma). Rows after the end of the sequence have
the values of its last token, so that no sum decays further and no difference that is exponentiated is positive.
"""

import triton
import triton.language as tl


@triton.jit
def sums_at(decay_ptr, rows, length, FIXED: tl.constexpr):
    """c at ``rows`` (any shape, int32) of a chunk with ``length`` tokens, fp32.

    ``decay_ptr`` is where the chunk's sums start or, with FIXED, the one log-decay of the head.
    """
    if FIXED:
        return tl.minimum(rows + 1, length) * tl.load(decay_ptr)
    else:
        return tl.load(decay_ptr + rows, mask=rows >= 0, other=0.0)


@triton.jit
def counts_at(counts_ptr, rows, RESETS: tl.constexpr):
    """r at ``rows`` of a chunk, int32; zeros, which the compiler folds away, without RESETS."""
    if RESETS:
        return tl.load(counts_ptr + rows, mask=rows >= 0, other=0)
    else:
        return rows * 0


@triton.jit
def decay_between(early_sums, early_counts, late_sums, late_counts):
    """The decay from earlier rows to later ones, fp32; the arguments broadcast."""
    return tl.where(early_counts == late_counts, tl.exp(late_sums - early_sums), 0.0)


@triton.jit
def decay_square(sums, counts, ROWS: tl.constexpr, REVERSED: tl.constexpr):
    """(ROWS, ROWS) decays among the rows of one tile: entry (i, j) from j to i or, REVERSED, from i to j; else 0.

    Pairs in the wrong order have positive differences, which are replaced before exp sees them.
    """
    rows = tl.arange(0, ROWS)
    same = counts[:, None] == counts[None, :]
    if REVERSED:
        seen = (rows[None, :] >= rows[:, None]) & same
        return tl.exp(tl.where(seen, sums[None, :] - sums[:, None], float("-inf")))
    else:
        seen = (rows[:, None] >= rows[None, :]) & same
        return tl.exp(tl.where(seen, sums[:, None] - sums[None, :], float("-inf")))
