"""The keyed permutation: a bijection at every size, and the same one on every platform."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trine.data_pipeline.permutation import Permutation

KEYS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=2).map(tuple)


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 5000), key=KEYS)
def test_bijection(size: int, key: tuple[int, ...]) -> None:
    images = Permutation(size, key)(np.arange(size))
    assert images.dtype == np.int64
    np.testing.assert_array_equal(np.sort(images), np.arange(size))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(5001, 1 << 62), key=KEYS, start=st.integers(0, 5000))
def test_large_ranges_stay_inside_and_collide_nowhere(size: int, key: tuple[int, ...], start: int) -> None:
    indices = np.arange(start, min(start + 64, size))
    images = Permutation(size, key)(indices)
    assert images.min() >= 0
    assert images.max() < size
    assert len(set(images.tolist())) == len(indices)


def test_every_part_can_be_computed_alone() -> None:
    permutation = Permutation(1000, (7, 3))
    whole = permutation(np.arange(1000))
    np.testing.assert_array_equal(permutation(np.array([[999, 0], [500, 1]])), whole[[[999, 0], [500, 1]]])


def test_pinned_vectors() -> None:
    # A run resumes on another machine or numpy only if these numbers never change.
    assert Permutation(1, (0,))(np.arange(1)).tolist() == [0]
    assert Permutation(1000, (7, 3))(np.arange(8)).tolist() == [620, 800, 481, 329, 654, 794, 270, 646]
    assert Permutation(244_000_001, (1234, 0))(np.arange(4)).tolist() == [
        97533032,
        192268158,
        15019486,
        154717514,
    ]


def test_keys_give_different_and_scattered_orders() -> None:
    size = 4096
    one, other = (Permutation(size, (0, epoch))(np.arange(size)) for epoch in (0, 1))
    # A random permutation has one fixed point on average and agrees with another one at one place on average.
    assert (one == other).sum() < 10
    assert (one == np.arange(size)).sum() < 10
    # The correlation of neighbours in a random permutation has a standard deviation of 1/64 at this size.
    assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 5 / 64


def test_wrong_use_is_named() -> None:
    with pytest.raises(ValueError, match=r"must be in \[1, 2\^62\], not 0"):
        Permutation(0, (1,))
    for outside in (-1, 10):
        with pytest.raises(IndexError, match=r"\[0, 10\)"):
            Permutation(10, (1,))(np.array([outside]))
