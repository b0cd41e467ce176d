"""A keyed permutation of range(size) that needs no memory per element: a Feistel network with cycle walking.

Luby and Rackoff (1988) for the network, Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002),
for the walk. A shuffle of a trillion tokens then costs nothing to set up and can be entered anywhere.
"""

from __future__ import annotations

import struct
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
# The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


class Permutation:
    """A bijection on range(size), chosen by ``key``: integers in [0, 2^64).

    A pure function of its arguments in integer arithmetic alone, hence the same on every platform.
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        if not 1 <= size <= 1 << 62:
            raise ValueError(f"the size of a permutation must be in [1, 2^62], not {size}")
        self._size = np.uint64(size)
        # The network works on 2h bits, the smallest such number that holds the range.
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_bits = np.uint64(half_bits)
        self._half_mask = np.uint64((1 << half_bits) - 1)
        digest = blake2b(struct.pack(f"<{len(key)}Q", *key), digest_size=8 * _ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, "<u8").astype(np.uint64)

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The images of ``indices``, in the same shape. Raises IndexError for one outside [0, size)."""
        if indices.size and (indices.min() < 0 or indices.max() >= self._size):
            raise IndexError(f"indices must be in [0, {self._size})")
        values = self._network(indices.astype(np.uint64))
        # The network permutes a range up to 4 times as large. Following it until it comes back into ours is a
        # bijection, because the cycle that an element lies on must return.
        outside = values >= self._size
        while outside.any():
            values[outside] = self._network(values[outside])
            outside = values >= self._size
        return values.astype(np.int64)

    def _network(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._half_mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ key) & self._half_mask)
        return (left << self._half_bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> _SHIFTS[0])) * _MULTIPLIERS[0]
    values = (values ^ (values >> _SHIFTS[1])) * _MULTIPLIERS[1]
    return values ^ (values >> _SHIFTS[2])
