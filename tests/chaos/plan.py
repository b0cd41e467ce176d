"""Which faults a chaos run has, and in which of its lives: a function of the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from company import LockOfAnotherHost, PausedRank, SecondStart, WrongClock
from damage import (
    FarOffTimes,
    FlippedByte,
    MissingShard,
    TruncatedManifest,
    TruncatedShard,
    TruncatedState,
    UnfinishedFolder,
)
from fault import Before, Ending, Meanwhile, Scene
from full_disk import FullAtTheEnd, FullForLong, FullForSomeSaves, FullFromTheStart
from kills import KillAllRanks, KillLauncher, KillRank, KillWhileStarting, StopRank
from stops import StopFile, Terminate, TerminateTwice, TerminateWhileStarting, UserSignal, WallTime

ENDINGS: tuple[type[Ending], ...] = (
    KillRank, KillAllRanks, KillLauncher, KillWhileStarting, StopRank, Terminate, TerminateTwice,
    TerminateWhileStarting, UserSignal, StopFile, WallTime, FullAtTheEnd, FullFromTheStart,
)  # fmt: skip
BEFORE: tuple[type[Before], ...] = (
    TruncatedShard, TruncatedManifest, TruncatedState, FlippedByte, MissingShard, UnfinishedFolder, FarOffTimes,
    LockOfAnotherHost,
)  # fmt: skip
MEANWHILE: tuple[type[Meanwhile], ...] = (FullForSomeSaves, FullForLong, PausedRank, SecondStart, WrongClock)
_ONCE = (StopRank, FullForLong, SecondStart, LockOfAnotherHost)
"""They take long."""

KINDS = len(ENDINGS) + len(BEFORE) + len(MEANWHILE)


@dataclass
class Chapter:
    """A life and its faults; the last one ends by finishing."""

    before: list[Before] = field(default_factory=list)
    meanwhile: list[Meanwhile] = field(default_factory=list)
    ending: Ending | None = None

    @property
    def lets_begin(self) -> bool:
        """Whether it is sure to train."""
        return self.ending is None or self.ending.lets_begin

    @property
    def lets_train(self) -> bool:
        """Whether it lasts."""
        return self.ending is None or self.ending.lets_train


def draw(seed: int, faults: int, scene: Scene) -> list[Chapter]:
    """The lives of a run with ``faults`` faults, and with every kind of them."""
    dice = random.Random(seed)
    kinds = [*ENDINGS, *BEFORE, *MEANWHILE]
    kinds += dice.choices([kind for kind in kinds if kind not in _ONCE], k=max(0, faults - len(kinds)))
    dice.shuffle(kinds)
    # Each has dice of its own, so that what one of them draws, which depends on time, is nothing to the others.
    drawn = [kind(random.Random(f"{seed} {number}"), scene) for number, kind in enumerate(kinds)]
    chapters = [Chapter(ending=fault) for fault in drawn if isinstance(fault, Ending)] + [Chapter()]
    for fault in drawn:
        if isinstance(fault, Before):
            dice.choice([chapter for chapter in chapters if chapter.lets_begin]).before.append(fault)
        elif isinstance(fault, Meanwhile):
            # Not the last one, which goes on for as many steps as happen to be left.
            dice.choice([chapter for chapter in chapters[:-1] if chapter.lets_train]).meanwhile.append(fault)
    return chapters
