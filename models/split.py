"""Where the stack is cut into pipeline chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from ..configs.schema import Config
from ..configs.stack import expand
from .flops import head_flops, layer_flops


def pipeline_split(config: Config) -> tuple[int, ...]:
    """Layers of each pipeline chunk in the order of the model, as ``parallel.pipeline_split`` asks for."""
    parallel, plans = config.parallel, expand(config.model.stack)
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if isinstance(parallel.pipeline_split, tuple):
        return parallel.pipeline_split
    if parallel.pipeline_split == "even":
        return (len(plans) // chunks,) * chunks
    costs = [layer_flops(plan, config.model, config.train.sequence_length) for plan in plans]
    return balanced_split(costs, head_flops(config.model), chunks)


def balanced_split(costs: Sequence[float], last: float, chunks: int) -> tuple[int, ...]:
    """Cut layers of these ``costs`` into consecutive chunks, none empty, so that the costliest costs least.

    ``last`` is the cost of what follows the last layer, and counts with its chunk. Among cuts that are equal in
    that, the one whose costs differ least (least sum of squares).
    """
    before = [0.0, *accumulate(costs)]
    end = len(costs)

    def cost(first: int, stop: int) -> float:
        return before[stop] - before[first] + (last if stop == end else 0.0)

    @cache
    def least_worst(first: int, left: int) -> float:
        """The cost of the costliest chunk when the layers from ``first`` are cut best into ``left`` chunks."""
        if left == 1:
            return cost(first, end)
        stops = range(first + 1, end - left + 2)
        return min(max(cost(first, stop), least_worst(stop, left - 1)) for stop in stops)

    limit = least_worst(0, chunks)

    @cache
    def least_squares(first: int, left: int) -> tuple[float, tuple[int, ...]]:
        """(sum of squares, split) of the same layers, no chunk costing more than ``limit``."""
        stops = range(first + 1, end - left + 2) if left > 1 else range(end, end + 1)
        found: list[tuple[float, tuple[int, ...]]] = []
        for stop in stops:
            if cost(first, stop) <= limit:
                squares, split = (0.0, ()) if left == 1 else least_squares(stop, left - 1)
                found.append((cost(first, stop) ** 2 + squares, (stop - first, *split)))
        return min(found, default=(math.inf, ()))

    return least_squares(0, chunks)[1]
