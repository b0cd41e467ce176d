"""Orders: every epoch visits each window once, from any place in it, and blocks are read in long runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trine.data_pipeline import order as order_module
from trine.data_pipeline.order import BLOCK, POOL, BlockOrder, Order, SampleOrder, SequentialOrder

SHUFFLED = [SampleOrder, BlockOrder]
Shuffled = Callable[[int, int], Order]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 windows, 4 to a pool: a pool has 32."""
    monkeypatch.setattr(order_module, "BLOCK", 8)
    monkeypatch.setattr(order_module, "POOL", 4)


@pytest.mark.parametrize("kind", SHUFFLED)
@pytest.mark.parametrize(
    "size", [1, 2, 3, 1023, 1024, 1025, 65535, 65536, 65537, 70000, 2 * BLOCK * POOL, 2 * BLOCK * POOL + 3000]
)
def test_every_epoch_visits_each_window_once(kind: Shuffled, size: int) -> None:
    epochs = kind(size, 7).sample_ids(0, 2 * size).reshape(2, size)
    assert epochs.dtype == np.int64
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))


@pytest.mark.parametrize("size", [*range(1, 70), 117, 96, 127, 128, 129])
def test_small_blocks_at_every_size(small_blocks: None, size: int) -> None:
    epochs = BlockOrder(size, 3).sample_ids(0, 2 * size).reshape(2, size)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(size))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(SHUFFLED), size=st.integers(1, 120), start=st.integers(0, 150), count=st.integers(0, 150))
def test_entered_anywhere_it_is_the_same_sequence(
    small_blocks: None, kind: Shuffled, size: int, start: int, count: int
) -> None:
    order = kind(size, 5)
    np.testing.assert_array_equal(order.sample_ids(start, count), order.sample_ids(0, start + count)[start:])


@pytest.mark.parametrize("kind", SHUFFLED)
def test_epochs_and_seeds_have_orders_of_their_own(kind: Shuffled) -> None:
    size = 4 * BLOCK
    one, two = kind(size, 1).sample_ids(0, 2 * size).reshape(2, size)
    other = kind(size, 2).sample_ids(0, size)
    # Two random permutations agree at one place on average.
    assert (one == two).sum() < 10
    assert (one == other).sum() < 10


@pytest.mark.parametrize("kind", SHUFFLED)
def test_neighbours_do_not_stay_neighbours(kind: Shuffled) -> None:
    size = BLOCK * POOL
    visited = kind(size, 0).sample_ids(0, size)
    # The correlation of neighbours in a random permutation of 65,536 has a standard deviation of 1/256.
    assert abs(np.corrcoef(visited[:-1], visited[1:])[0, 1]) < 5 / 256
    assert (np.diff(visited) == 1).sum() < 10
    assert abs(np.corrcoef(visited, np.arange(size))[0, 1]) < 5 / 256


def test_a_pool_reads_its_own_blocks_alone(small_blocks: None) -> None:
    """3 whole pools of 32 windows, one of 2 blocks, and 5 windows left over."""
    size, pools = 117, [slice(0, 32), slice(32, 64), slice(64, 96), slice(96, 112)]
    epochs = BlockOrder(size, 9).sample_ids(0, 3 * size).reshape(3, size)
    for epoch in epochs:
        blocks = [set((epoch[pool] // 8).tolist()) for pool in pools]
        assert [len(of_pool) for of_pool in blocks] == [4, 4, 4, 2]
        assert set().union(*blocks) == set(range(14))
        assert set(epoch[112:].tolist()) == set(range(112, 117))
    assert len({tuple(sorted(set((epoch[:32] // 8).tolist()))) for epoch in epochs}) > 1


def test_the_windows_of_a_pool_are_shuffled_across_its_blocks(small_blocks: None) -> None:
    for start in (0, 32, 64):
        blocks = BlockOrder(96, 4).sample_ids(start, 32) // 8
        # Blocks read one behind the other would change 3 times; shuffled, neighbours differ 24 times on average.
        assert (np.diff(blocks) != 0).sum() > 16


def test_sequential_order_cycles_over_the_split() -> None:
    assert SequentialOrder(3).sample_ids(2, 5).tolist() == [2, 0, 1, 2, 0]
    assert SequentialOrder(3).sample_ids(4, 0).size == 0


def test_far_into_a_run_of_trillions() -> None:
    """No epoch before is computed: this takes no longer than at the start."""
    size, start = 244_000_001, 10**15
    for kind in SHUFFLED:
        visited = kind(size, 1).sample_ids(start, 512)
        assert len(set(visited.tolist())) == 512
        assert visited.min() >= 0
        assert visited.max() < size


def test_pinned_vectors() -> None:
    # A run resumes on another machine or version only if these numbers never change.
    assert SampleOrder(1000, 1234).sample_ids(998, 4).tolist() == [242, 759, 188, 854]
    assert BlockOrder(70_000, 1234).sample_ids(65_534, 4).tolist() == [10382, 41030, 24979, 3231]
    assert BlockOrder(70_000, 1234).sample_ids(69_998, 4).tolist() == [69742, 69917, 69532, 64949]
