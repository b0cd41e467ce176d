"""What a fault is: when it happens, what it does, and what trine promises about it."""

from __future__ import annotations

import random
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from demo import Run
from life import Life
from small_disk import SmallDisk

from trine.pretrain.exit_state import STOPPED


class NotYetError(Exception):
    """There is nothing yet that the fault could hit."""


@dataclass(frozen=True)
class Pace:
    """How fast the run is on this machine, for faults that are to hit a moment within something."""

    start_s: float
    step_s: float
    save_s: float
    checkpoint_bytes: int


@dataclass(frozen=True)
class Scene:
    """Where faults happen."""

    run: Run
    disk: SmallDisk
    pace: Pace


class Fault(ABC):
    """Something that goes wrong, drawn from a seed."""

    kind: ClassVar[str]
    struck: float | None = None
    """When it happened, where ``inject`` goes on for longer."""

    def __init__(self, dice: random.Random, scene: Scene) -> None:
        self.dice, self.scene = dice, scene

    def broken(self, life: Life) -> Iterable[str]:
        """The promises about this fault that ``life`` did not keep, once it has ended."""
        return ()

    def answer(self, life: Life) -> str:
        """What trine has said or done about it."""
        return "goes on"


class Before(Fault):
    """Happens between two lives; the next one that begins to train must answer."""

    setback: ClassVar[int] = 0
    """Checkpoints by which the run may fall back."""

    @abstractmethod
    def inject(self) -> str:
        """Do it, and say what was done. Raises NotYetError."""


class Meanwhile(Fault):
    """Happens to a life that goes on."""

    def variables(self) -> dict[str, str]:
        """Of the environment of the life."""
        return {}

    @abstractmethod
    def inject(self, life: Life) -> str:
        """Do it, and say what was done. Raises LifeError."""


class Ending(Fault):
    """Ends a life."""

    codes: tuple[int, ...] = (1,)
    """Exit codes that fit."""
    outcomes: tuple[str | None, ...] = (None, "failed")
    """Outcomes in ``exit_state.json`` that fit; None where there is no file."""
    resumes = True
    """What ``resume`` is there."""
    says: str | None = None
    """A pattern that its console must show."""
    lets_begin: ClassVar[bool] = True
    """Whether the life is sure to get as far as training, so that it can answer to faults from before."""
    lets_train: ClassVar[bool] = True
    """Whether it lasts for as long as other faults need."""

    def overrides(self) -> list[str]:
        """What is added to the command."""
        return []

    def prepare(self) -> None:
        """Do what must be done before the life starts."""

    def clean_up(self) -> None:
        """Take away what was only there for this life."""

    @abstractmethod
    def inject(self, life: Life, steps: int) -> str:
        """Do it some time after ``steps`` steps of the life, and say what was done. Raises LifeError."""

    def answer(self, life: Life) -> str:
        ended = [line for line in life.console.splitlines() if line.startswith("stopped at step")]
        named = [line for line in life.sentences if self.says and re.search(self.says, line)]
        return (ended or named or life.sentences or ["nothing"])[-1].removeprefix("trine: ")

    def broken(self, life: Life) -> Iterable[str]:
        if self.says is not None and not re.search(self.says, life.console):
            yield f"the console does not say {self.says!r}"


class Stopping(Ending):
    """Asks the run to stop: it saves and may be continued."""

    codes, outcomes = (STOPPED,), ("stopped",)
    says = r"stopped at step \d+, since a signal asked for it"


class Moment:
    """A random moment of a life: within a step, or within a save."""

    def __init__(self, dice: random.Random, scene: Scene) -> None:
        self._in_save, self._fraction, self._scene = dice.random() < 0.4, dice.random(), scene

    def wait(self, life: Life, steps: int) -> str:
        """Let it come, after ``steps`` steps of the life; says when it was."""
        life.wait(lambda: life.start_step is not None, "it began to train")
        target = (life.start_step or 0) + steps
        life.wait(lambda: life.step >= target, f"step {target}")
        pace, run = self._scene.pace, self._scene.run
        if self._in_save:
            life.wait(lambda: any(run.checkpoints.glob("step-*.writing")), "a save began")
        time.sleep(self._fraction * (pace.save_s if self._in_save else pace.step_s))
        return "during a save" if any(run.checkpoints.glob("step-*.writing")) else "in a step"


def wait_while_starting(life: Life, seconds: float, steps: int) -> str:
    """Let ``seconds`` of a start pass, or ``steps`` steps where it starts faster than the run without faults did."""

    def trains() -> bool:
        return life.start_step is not None and life.step >= life.start_step + steps

    life.wait(lambda: time.monotonic() - life.started > seconds or trains(), "it had started for a while")
    return f"{time.monotonic() - life.started:.1f} s after the start"
