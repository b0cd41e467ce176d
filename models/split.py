"""Where the stack is cut into pipeline chunks."""

from __future__ import annotations

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

    @cache
    def best(first: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """(costliest, sum of squares, split) of the layers from ``first`` in ``left`` chunks."""
        if left == 1:
            cost = before[-1] - before[first] + last
            return cost, cost * cost, (len(costs) - first,)
        found = []
        for stop in range(first + 1, len(costs) - left + 2):
            cost = before[stop] - before[first]
            worst, squares, split = best(stop, left - 1)
            found.append((max(cost, worst), squares + cost * cost, (stop - first, *split)))
        return min(found)

    return best(0, chunks)[2]
