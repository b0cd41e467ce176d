"""Whether sequences can be divided over context ranks and, under sequence parallelism, over tensor ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .errors import UsageError
from .remedies import divisors, listed, nearest_multiples
from .schema import Parallel, Train
from .stack import AttentionSegment, DifferentialSegment, DifferentialV2Segment, Segment, context_order

ExchangingSegment = AttentionSegment | DifferentialSegment | DifferentialV2Segment
"""The mixers that ``parallel.context_exchange`` speaks of."""


def check_sequence(stack: tuple[Segment, ...], train: Train, parallel: Parallel) -> None:
    """Raise UsageError, in one sentence, unless every sequence length of the run can be divided over the ranks."""
    if parallel.sequence and parallel.tensor == 1:
        raise UsageError(
            "parallel.sequence=true splits activations over the tensor ranks, and parallel.tensor=1 has only one: "
            "turn it off or raise parallel.tensor"
        )
    ramp = {f"train.sequence_ramp.{n}.sequence_length": s.sequence_length for n, s in enumerate(train.sequence_ramp)}
    for name, length in {"train.sequence_length": train.sequence_length, **ramp}.items():
        _check_length(name, length, stack, parallel)


def _check_length(name: str, length: int, stack: tuple[Segment, ...], parallel: Parallel) -> None:
    if length < 2:
        raise UsageError(f"{name}={length} leaves no token to predict: use 2 or more")
    zigzag = parallel.context > 1 and context_order(stack) == "zigzag"
    chunks = 2 * parallel.context if zigzag else parallel.context
    rows = parallel.context * (parallel.tensor if parallel.sequence else 1)
    fitting = math.lcm(chunks, rows)
    if length % chunks:
        raise _indivisible_over_context(name, length, parallel.context, fitting, zigzag=zigzag)
    if length % rows:
        raise _indivisible_over_tensor(name, length, parallel, fitting)


def check_exchange(stack: tuple[Segment, ...], parallel: Parallel) -> None:
    """Raise UsageError, in one sentence, unless ``parallel.context_exchange`` can deal out the heads it must.

    ``all_to_all`` gives each context rank an equal number of the heads of a tensor rank, in each plain global softmax
    mixer. Expects a model that ``check_tensor`` accepts.
    """
    context = parallel.context
    if parallel.context_exchange != "all_to_all" or context == 1:
        return
    heads = [(name, count, count // parallel.tensor) for name, count in _exchanged_heads(stack)]
    for name, count, local in heads:
        if local % context:
            sizes = listed(divisors(math.gcd(*(local for _, _, local in heads))))
            raise UsageError(
                f"{name}={count} over parallel.tensor={parallel.tensor} is {local} per rank, which "
                f"parallel.context_exchange=all_to_all cannot deal out over parallel.context={context}: "
                f"use parallel.context_exchange=gather, or one of the context sizes that fit this model: {sizes}"
            )


def _exchanged_heads(stack: tuple[Segment, ...]) -> Iterator[tuple[str, int]]:
    for index, segment in enumerate(stack):
        if isinstance(segment, ExchangingSegment):
            for name, count in segment.tensor_parallel_units().items():
                yield f"model.stack.{index}.{name}", count


def _indivisible_over_context(name: str, length: int, context: int, fitting: int, *, zigzag: bool) -> UsageError:
    pairs = " into two chunks per rank, which balance mixers that see the whole past" if zigzag else ""
    return UsageError(
        f"{name}={length} cannot be divided over parallel.context={context}{pairs}: "
        f"use {nearest_multiples(length, fitting)}"
    )


def _indivisible_over_tensor(name: str, length: int, parallel: Parallel, fitting: int) -> UsageError:
    local = "" if parallel.context == 1 else f" over parallel.context={parallel.context} and then"
    return UsageError(
        f"{name}={length} cannot be divided{local} over parallel.tensor={parallel.tensor}, which "
        f"parallel.sequence=true needs: use {nearest_multiples(length, fitting)}"
    )
