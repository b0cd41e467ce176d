"""Which rank is slow: how the time that each spends on its own work spreads over the ranks."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)

_LEAST_S = 0.01
"""Differences below this are noise, whatever their ratio."""


@dataclass(frozen=True)
class Spread:
    """Own work of all ranks in one step, in seconds (``Engine.own_work_s``)."""

    least: float
    median: float
    most: float
    slowest: int
    """The rank of ``most``."""

    def values(self) -> dict[str, float]:
        """For TensorBoard."""
        return {
            "time/own_work_min": self.least,
            "time/own_work_median": self.median,
            "time/own_work_max": self.most,
            "resilience/slowest_rank": float(self.slowest),
        }


class Stragglers:
    """Names a rank whose own work is far above the median twice in a row, and says when that is over."""

    def __init__(self, ratio: float, hosts: Sequence[str]) -> None:
        self._ratio, self._hosts = ratio, hosts
        self._suspect: int | None = None
        self._named: int | None = None

    def see(self, step: int, own_work: Sequence[float]) -> Spread:
        """Take note of every rank's own work in ``step``."""
        slowest = max(range(len(own_work)), key=own_work.__getitem__)
        spread = Spread(min(own_work), statistics.median_low(own_work), own_work[slowest], slowest)
        slow = spread.most > self._ratio * spread.median and spread.most - spread.median > _LEAST_S
        suspect = slowest if slow else None
        if suspect is not None and suspect == self._suspect != self._named:
            self._named = suspect
            logger.warning(
                "step %d: rank %d on host %s is a straggler: its own work takes %.3f s, the median %.3f s",
                step, slowest, self._hosts[slowest], spread.most, spread.median,
            )  # fmt: skip
        elif suspect is None and self._named is not None:
            logger.warning("step %d: rank %d is no straggler any more", step, self._named)
            self._named = None
        self._suspect = suspect
        return spread
