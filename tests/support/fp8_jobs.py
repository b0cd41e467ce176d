"""Jobs for the rank pool about 8-bit products."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from trine.configs.errors import UsageError
from trine.configs.schema import Config
from trine.models import decoder
from trine.parallel import fp8_linear
from trine.parallel.fp8_linear import Fp8ColumnLinear, Fp8RowLinear
from trine.parallel.linear import ColumnLinear, RowLinear
from trine.pretrain.parity import batch_of_step, joined_engine, take_steps


def magnitudes(
    rank: int, world_size: int, *, config: dict[str, Any], state: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The histories of the whole model after one step, going on from those of ``state``."""
    with joined_engine(rank, world_size, Config.model_validate(config)) as engine:
        engine.fp8.restore(state)
        engine.train_step(batch_of_step(engine, 0))
        after = engine.fp8.state()
    assert after is not None
    return after


def eight_bit_weights(rank: int, world_size: int, *, config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """The shapes of this rank's weights that are multiplied in 8 bits, by global name."""
    with joined_engine(rank, world_size, Config.model_validate(config)) as engine:
        return {
            chunk.global_name(f"{name}.weight"): tuple(module.weight.shape)
            for chunk in engine.chunks
            for name, module in chunk.named_modules()
            if isinstance(module, (Fp8ColumnLinear, Fp8RowLinear))
        }


def without_rounding(rank: int, world_size: int, *, config: dict[str, Any], steps: int) -> Any:
    """Training through the same products and scales, with operands that are not rounded to 8 bits."""
    with pytest.MonkeyPatch.context() as patch:
        from trine.kernels.fp8 import quantise

        patch.setattr(quantise, "_rounded", lambda x, dtype: x)
        with joined_engine(rank, world_size, Config.model_validate(config)) as engine:
            return take_steps(engine, steps)


def calls_in_the_context(rank: int, world_size: int, *, config: dict[str, Any]) -> dict[bool, int]:
    """How many calls of linear maps in a step are inside, True, and outside of what the maps must be called in."""
    depth, calls = 0, {True: 0, False: 0}

    @contextmanager
    def marker(*_: object) -> Iterator[None]:
        nonlocal depth
        depth += 1
        try:
            yield
        finally:
            depth -= 1

    def noting(forward: Any) -> Any:
        def noted(module: Any, x: torch.Tensor) -> Any:
            calls[depth > 0] += 1
            return forward(module, x)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "linears_context", marker)
        for kind in (ColumnLinear, RowLinear):
            patch.setattr(kind, "forward", noting(kind.forward))
        with joined_engine(rank, world_size, Config.model_validate(config)) as engine:
            engine.train_step(batch_of_step(engine, 0))
    return calls


def maxima_over_ranks(rank: int, world_size: int, *, config: dict[str, Any], steps: int) -> list[int]:
    """How often a map's magnitude is made one over ranks in each of the first steps."""
    counts: list[int] = []
    with joined_engine(rank, world_size, Config.model_validate(config)) as engine:
        for step in range(steps):
            with _count(fp8_linear.dist, "all_reduce", lambda _: True) as calls:
                engine.compute_gradients(batch_of_step(engine, step))
            # The sums of row-parallel maps, of gradients and of losses are those of every step.
            counts.append(len(calls))
            engine.update(engine.gradient_norm())
    return [count - counts[-1] for count in counts]


def quantisations_of_weights(rank: int, world_size: int, *, config: dict[str, Any]) -> list[int]:
    """How often operands of weights are made in a step of several microbatches, in the next, and in an evaluation."""
    counts: list[int] = []
    with joined_engine(rank, world_size, Config.model_validate(config)) as engine:
        made = _count(fp8_linear.Fp8Product, "_both", lambda arguments: arguments[-1] == 1)
        with made as calls:
            for step in range(2):
                engine.train_step(batch_of_step(engine, step))
                counts.append(len(calls))
                calls.clear()
            engine.evaluate(batch_of_step(engine, 0), 2)
            counts.append(len(calls))
    return counts


def losses_with_and_without(rank: int, world_size: int, *, config: dict[str, Any]) -> list[float]:
    """Of one step's microbatches: with FP8, without it before the update, with it again."""
    with joined_engine(rank, world_size, Config.model_validate(config)) as engine:
        from trine.configs.ramps import full_shape

        shape = full_shape(engine.config.train)
        first = engine.compute_gradients(batch_of_step(engine, 0))
        without = engine.loss_without_fp8(batch_of_step(engine, 0), shape)
        return [first, without, engine.compute_gradients(batch_of_step(engine, 0))]


def refused(rank: int, world_size: int, *, config: dict[str, Any]) -> str:
    """What is said of a configuration that this machine cannot run."""
    try:
        with joined_engine(rank, world_size, Config.model_validate(config)):
            return "accepted"
    except UsageError as error:
        return str(error)


def said_when_loading(rank: int, world_size: int, *, config: dict[str, Any], state: dict[str, Any] | None) -> str:
    """What the log says when a checkpoint with ``state`` is loaded."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("trine.parallel.fp8_control")
    with joined_engine(rank, world_size, Config.model_validate(config)) as engine:
        logger.addHandler(handler)
        before = logger.level
        logger.setLevel(logging.INFO)
        try:
            engine.fp8.restore(state)
        finally:
            logger.setLevel(before)
            logger.removeHandler(handler)
    return "\n".join(messages)


def spoilt(rank: int, world_size: int, *, config: dict[str, Any]) -> list[float]:
    """Losses of a good step, of one with an infinite weight on the last rank, and whether histories stay finite."""
    with joined_engine(rank, world_size, Config.model_validate(config)) as engine:
        losses = [engine.train_step(batch_of_step(engine, 0)).loss]
        weight = engine.chunks[0].decoder.layers[0].mixer.input.weight
        if rank == world_size - 1:
            with torch.no_grad():
                weight[0, 0] = torch.inf
        losses.append(engine.compute_gradients(batch_of_step(engine, 1)))
        engine.skip_update()
        state = engine.fp8.state() or {}
        return [*losses, max(x for past in state.values() for role in past for x in role)]


class _count:
    def __init__(self, owner: Any, name: str, counts: Any) -> None:
        self._owner, self._name, self._counts = owner, name, counts
        self.calls: list[int] = []

    def __enter__(self) -> list[int]:
        original = self._original = getattr(self._owner, self._name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            if self._counts(arguments):
                self.calls.append(1)
            return original(*arguments, **options)

        setattr(self._owner, self._name, wrapper)
        return self.calls

    def __exit__(self, *_: object) -> None:
        setattr(self._owner, self._name, self._original)
