"""The order in which a run visits the windows of one source: a pure function of the seed, entered anywhere."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .permutation import Permutation

BLOCK = 1024
"""Windows that lie one behind the other and are read together by ``BlockOrder``: 8 MiB of uint16 at 4,096 tokens."""
POOL = 64
"""Blocks whose windows are shuffled among each other."""


class Order(Protocol):
    """The endless sequence of window numbers that is read of a source."""

    def sample_ids(self, start: int, count: int) -> NDArray[np.int64]:
        """(count,): the windows that are read as number ``start`` .. ``start + count - 1``."""


class SampleOrder:
    """Every epoch visits each window once, in an order of its own that ``seed`` decides."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed

    def sample_ids(self, start: int, count: int) -> NDArray[np.int64]:
        """(count,): number i is element i % size of the permutation of epoch i // size."""
        stop = start + count
        epochs = range(start // self._size, -(-stop // self._size))
        return np.concatenate([np.empty(0, np.int64), *(self._epoch(epoch, start, stop) for epoch in epochs)])

    def _epoch(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """The part of an epoch that lies in [start, stop)."""
        first = epoch * self._size
        inside = np.arange(max(start - first, 0), min(stop - first, self._size), dtype=np.int64)
        return self._visited(epoch, inside)

    def _visited(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The windows at ``places`` of an epoch."""
        return Permutation(self._size, (self._seed, epoch))(places)


class BlockOrder(SampleOrder):
    """As ``SampleOrder``, but reading long runs: blocks of BLOCK windows are shuffled, then the windows of POOL blocks.

    The windows left over at the end, less than a block, are the last of every epoch.
    """

    def _visited(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        whole = self._size // BLOCK
        rest = Permutation(max(1, self._size - whole * BLOCK), (self._seed, epoch, whole))
        windows = np.empty_like(places)
        in_blocks = places < whole * BLOCK
        windows[~in_blocks] = whole * BLOCK + rest(places[~in_blocks] - whole * BLOCK)
        blocks = Permutation(max(1, whole), (self._seed, epoch))
        pools = places // (BLOCK * POOL)
        for pool in np.unique(pools[in_blocks]):
            here = in_blocks & (pools == pool)
            first = int(pool) * POOL
            size = min(POOL, whole - first) * BLOCK
            shuffled = Permutation(size, (self._seed, epoch, int(pool), 1))(places[here] - first * BLOCK)
            windows[here] = blocks(first + shuffled // BLOCK) * BLOCK + shuffled % BLOCK
        return windows


class SequentialOrder:
    """The windows as they lie, again and again: the same ones for every evaluation."""

    def __init__(self, size: int) -> None:
        self._size = size

    def sample_ids(self, start: int, count: int) -> NDArray[np.int64]:
        """(count,): number i is window i % size."""
        return np.arange(start, start + count, dtype=np.int64) % self._size
