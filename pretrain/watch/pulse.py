"""What the main thread of a rank is doing, told so cheaply that it can be told at every microbatch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

PATIENCE = {"start": 10.0, "load": 10.0, "save": 10.0}
"""Phases that may last this many times as long as any other: they move a whole model through a file system."""

ALONE = frozenset({"data"})
"""Phases in which a rank waits for no other rank: one that stands still there is the one that hangs."""

COURSE = ("start", "load", "data", "forward and backward", "optimizer", "agreement", "evaluation", "save")
"""The order of the phases within a step: of ranks at the same step, those in an earlier phase are behind."""

Moment = tuple[str, int, int, float]
"""Phase, step, turn and the ``time.monotonic()`` at which the phase was entered."""


class Pulse:
    """Written by the main thread, read by the thread that watches it.

    Both see whole moments, for one is replaced by assigning one attribute.
    """

    def __init__(self) -> None:
        self.moment: Moment = ("start", 0, 0, time.monotonic())
        self.finished = 0
        """The last step that this rank has finished."""

    def enter(self, phase: str, step: int) -> None:
        """Say that the main thread begins ``phase`` of ``step``, or that it moves on within it.

        Every rank must tell the same steps in the same order, whatever the phases.
        """
        _, last, turn, _ = self.moment
        # The turn counts steps as they are worked on: a run that goes back to a checkpoint repeats their numbers.
        self.moment = (phase, step, turn if step == last else turn + 1, time.monotonic())

    def step_done(self, step: int) -> None:
        """Say that ``step`` is finished, or that the run goes on from a checkpoint of it."""
        self.finished = step

    def through(self, batches: Iterable[T], phase: str, step: int) -> Iterator[T]:
        """The same batches: to wait for one is the phase ``data``, and to have it ``phase``."""
        self.enter("data", step)
        for batch in batches:
            self.enter(phase, step)
            yield batch
            self.enter("data", step)
        self.enter(phase, step)
