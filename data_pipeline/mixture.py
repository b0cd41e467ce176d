"""Several sources as one endless sequence of samples, in which each has its share everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..configs.errors import UsageError
from .dataset import TokenDataset
from .order import Order
from .permutation import Permutation

SLOTS = 1 << 16
"""Samples after which the sources follow each other in the same pattern again: shares are exact to 1/SLOTS."""


_RUN = 512
"""Samples whose ids are computed at once."""


class SampleId(NamedTuple):
    """Which window of which source."""

    source: int
    window: int


class Shares:
    """Which source each sample of a mixture comes from.

    Source s has ``slots[s]`` of SLOTS places, spread so evenly that of any n samples in a row it has
    n * slots[s] / SLOTS to within 2, however many sources there are.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Raises UsageError where a weight is so small beside the others that it gets no place."""
        slots = _largest_remainders(weights)
        for number, count in enumerate(slots):
            if count == 0:
                raise UsageError(
                    f"data.sources.{number}.weight={weights[number]:g} is less than 1/{SLOTS} of all weights, so the "
                    "source would never be read: raise it, or leave the source out"
                )
        self.slots = slots
        self._source = _spread(tuple(slots))
        self._rank = np.empty(SLOTS, np.int64)
        for number, count in enumerate(slots):
            self._rank[self._source == number] = np.arange(count)

    def places(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(count,) source of the samples ``start`` .. ``start + count - 1``, and (count,) their number within it."""
        rounds, slot = np.divmod(np.arange(start, start + count, dtype=np.int64), SLOTS)
        source = self._source[slot]
        return source, rounds * np.array(self.slots)[source] + self._rank[slot]

    def counts(self, samples: int) -> list[int]:
        """How many of the first ``samples`` each source has."""
        rounds, rest = divmod(samples, SLOTS)
        begun = np.bincount(self._source[:rest], minlength=len(self.slots))
        return [rounds * slots + int(more) for slots, more in zip(self.slots, begun, strict=True)]


@dataclass(frozen=True)
class Source:
    """A split of one folder of prepared data, and how it is read."""

    name: str
    """For logs and tags."""
    dataset: TokenDataset
    weight: float
    order: Order


class Mixture:
    """The samples of a run, as a function of how many were consumed.

    A mixture may take the place of another in mid-run: then it begins at sample ``start``, and each source reads on
    after the ``read`` samples that the run has read of it.
    """

    def __init__(self, sources: Sequence[Source], start: int = 0, read: Sequence[int] | None = None) -> None:
        self.sources = tuple(sources)
        self.start = start
        self._read = tuple(read or (0,) * len(self.sources))
        self._shares = Shares([source.weight for source in self.sources])
        # A permutation costs the same for one element and for hundreds, and steps ask for neighbours.
        self._run = lru_cache(maxsize=4)(self._computed_run)

    def sample_ids(self, start: int, count: int) -> list[SampleId]:
        """The samples consumed as number ``start`` .. ``start + count - 1``; ``start`` is not before the mixture's."""
        first, skipped = divmod(start - self.start, _RUN)
        runs = range(first, first - (-(skipped + count) // _RUN))
        return list(islice(chain.from_iterable(map(self._run, runs)), skipped, skipped + count))

    def _computed_run(self, number: int) -> list[SampleId]:
        """Samples ``number`` * _RUN ... of the mixture."""
        source, place = self._shares.places(number * _RUN, _RUN)
        windows = np.empty_like(place)
        for number, (one, read) in enumerate(zip(self.sources, self._read, strict=True)):
            mine = source == number
            if mine.any():
                places = place[mine]
                # The places of a source within consecutive samples are consecutive.
                windows[mine] = one.order.sample_ids(read + int(places[0]), len(places))
        return [SampleId(*pair) for pair in zip(source.tolist(), windows.tolist(), strict=True)]

    def samples_read(self, consumed: int) -> list[int]:
        """Samples of each source among the first ``consumed`` of the run."""
        counts = self._shares.counts(consumed - self.start)
        return [read + count for read, count in zip(self._read, counts, strict=True)]

    def read_into(self, tokens: NDArray[np.int64], sample: SampleId, *, documents: bool) -> NDArray[np.int64]:
        """Read a sample as ``TokenDataset.read_into`` does. Raises Damage where it is not what was prepared."""
        return self.sources[sample.source].dataset.read_into(tokens, sample.window, documents=documents)

    def substitute(self, sample: SampleId, attempt: int) -> SampleId:
        """The window of the same source that is tried as number ``attempt`` in place of a damaged one.

        Drawn anew each time and from anywhere: the neighbours of a damaged window are often damaged as well.
        """
        size = len(self.sources[sample.source].dataset)
        window = Permutation(size, (_SUBSTITUTION, attempt))(np.array([sample.window]))
        return SampleId(sample.source, int(window[0]))


_SUBSTITUTION = int.from_bytes(b"damaged", "little")
"""Sets these permutations apart from those of the epochs."""


def _largest_remainders(weights: Sequence[float]) -> list[int]:
    """SLOTS divided in proportion to ``weights``; what rounding down leaves goes to the largest remainders."""
    # The largest weight first becomes 1, so that no sum of weights overflows.
    relative = np.array(weights, np.float64) / max(weights)
    exact = relative / relative.sum() * SLOTS
    slots = np.floor(exact).astype(np.int64)
    order = np.argsort(slots - exact, kind="stable")
    slots[order[: SLOTS - int(slots.sum())]] += 1
    return [int(count) for count in slots]


@lru_cache(8)
def _spread(slots: tuple[int, ...]) -> NDArray[np.int64]:
    """(SLOTS,): the source of each place, so that the first n hold n * slots[s] / SLOTS of source s to within 1.

    The chairman assignment of Tijdeman (1980): the j-th place of a source lies in the j-th of ``slots[s]`` equal parts
    of the pattern, and of the sources whose part has begun that one is next whose part ends first.
    """
    pattern = np.empty(SLOTS, np.int64)
    taken = [0] * len(slots)
    waiting = [(0, source) for source in range(len(slots))]
    ready: list[tuple[int, int]] = []
    for place in range(SLOTS):
        while waiting and waiting[0][0] <= place:
            source = heappop(waiting)[1]
            heappush(ready, (-(-(taken[source] + 1) * SLOTS // slots[source]), source))
        source = pattern[place] = heappop(ready)[1]
        taken[source] += 1
        heappush(waiting, (taken[source] * SLOTS // slots[source], source))
    pattern.setflags(write=False)
    return pattern
