"""A run from its first life to its last: faults happen, a supervisor starts it again, promises are checked."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from fault import Before, Fault, NotYetError, Scene
from life import END_S, LONG_S, Life, LifeError
from plan import Chapter
from promises import Before as State
from promises import broken_by
from remains import read_checkpoints, read_lines

_RESERVE = 20
"""Steps that are left for the last life."""
_MEANWHILE = 12
"""Steps that a life goes on for each fault that does not end it."""


@dataclass
class Told:
    """A fault and what came of it."""

    fault: str
    life: int
    step: int
    done: str
    answer: str = ""
    code: int | None = None
    gone_s: float | None = None
    """From the fault until the last process was gone."""
    repeated: int | None = None
    """Steps that have to be done again because of it."""
    recovery_s: float | None = None
    """From the fault until the first step of the next life."""
    problems: list[str] = field(default_factory=list)
    at: float = field(default=0.0, repr=False)

    def document(self) -> dict[str, Any]:
        """For the report."""
        return {name: value for name, value in asdict(self).items() if name != "at"}


class Campaign:
    """Carries out the chapters."""

    def __init__(self, scene: Scene, chapters: list[Chapter], dice: Random, folder: Path, say: Callable[[Told], None]) -> None:
        self._scene, self._chapters, self._dice, self._folder, self._say = scene, chapters, dice, folder, say
        self.told: list[Told] = []
        self.problems: list[str] = []
        self.lives = 0
        self.disk_was_full = False
        self.finished = False
        self._last_step, self._had_checkpoint = 0, False
        self._waiting: list[Told] = []
        """Faults that ended a life, for which the next one has not made a step yet."""

    def run(self) -> None:
        """Carry out everything; afterwards ``problems`` tells what was not as promised."""
        late: list[Before] = []
        while self._chapters and not self.finished:
            chapter = self._chapters.pop(0)
            if chapter.lets_begin:
                chapter.before[:0], late = late, []
            late += self._live(chapter)
        for fault in [*late, *(fault for chapter in self._chapters for fault in _faults(chapter))]:
            self.problems.append(f"{fault.kind} never came about")
        if not self.finished:
            self.problems.append("the run has not finished")

    def _live(self, chapter: Chapter) -> list[Before]:
        """One life; returns the faults for which it was too early."""
        late, told = self._happen_before(chapter.before)
        checkpoints = read_checkpoints(self._scene.run)
        state = State(checkpoints.newest, self._had_checkpoint)
        variables = {name: value for fault in chapter.meanwhile for name, value in fault.variables().items()}
        overrides = chapter.ending.overrides() if chapter.ending else []
        if chapter.ending:
            chapter.ending.prepare()
        self.lives += 1
        life = Life(
            self._scene.run, self.lives, self._folder / f"life-{self.lives:02d}", overrides=overrides, variables=variables
        )
        try:
            self._happen(chapter, life, state, told)
            code = life.wait_ended(END_S if chapter.ending else LONG_S)
        except LifeError as error:
            life.kill()
            code = life.process.returncode
            self.problems.append(str(error))
        finally:
            life.kill()
            if chapter.ending:
                chapter.ending.clean_up()
        self._settle(chapter, life, code, state, told)
        return late

    def _happen_before(self, faults: list[Before]) -> tuple[list[Before], list[tuple[Fault, Told]]]:
        late: list[Before] = []
        told: list[tuple[Fault, Told]] = []
        newest = read_checkpoints(self._scene.run).newest
        for fault in faults:
            try:
                done = fault.inject()
            except NotYetError:
                late.append(fault)
                continue
            left = read_checkpoints(self._scene.run).newest
            entry = Told(fault.kind, self.lives + 1, self._last_step, done, repeated=newest - left, at=time.monotonic())
            told.append((fault, entry))
            newest = left
        return late, told

    def _happen(self, chapter: Chapter, life: Life, state: State, told: list[tuple[Fault, Told]]) -> None:
        for fault in chapter.meanwhile:
            done = fault.inject(life)
            told.append((fault, Told(fault.kind, life.number, life.step, done, at=time.monotonic())))
        if chapter.ending is not None:
            steps = max(0, life.step - (life.start_step or 0)) + self._share(state.newest)
            done = chapter.ending.inject(life, steps)
            at = chapter.ending.struck or time.monotonic()
            told.append((chapter.ending, Told(chapter.ending.kind, life.number, life.step, done, at=at)))

    def _share(self, start: int) -> int:
        """Steps for this life to make, so that some are left for each of those that follow."""
        later = sum(len(chapter.meanwhile) for chapter in self._chapters)
        left = self._scene.run.steps - _RESERVE - _MEANWHILE * later - start
        return self._dice.randint(1, max(2, int(1.6 * left / (len(self._chapters) + 1))))

    def _settle(self, chapter: Chapter, life: Life, code: int, state: State, told: list[tuple[Fault, Told]]) -> None:
        full = any("disk full" in fault.kind for fault in _faults(chapter))
        self.disk_was_full |= full
        self._note_recovery(life)
        common = list(broken_by(life, code, chapter.ending, state, disk_was_full=full))
        for number, (fault, entry) in enumerate(told):
            entry.problems += [*(common if number == len(told) - 1 else []), *fault.broken(life)]
            self._note_answer(fault, entry, life, code, ends=fault is chapter.ending)
            self.problems += [f"life {life.number}, {entry.fault} ({entry.done}): {what}" for what in entry.problems]
            self.told.append(entry)
            self._say(entry)
        if not told:
            self.problems += [f"life {life.number}: {what}" for what in common]
        self._last_step = max(read_lines(life.run.directory / "metrics.jsonl").steps, default=0)
        self._had_checkpoint |= bool(read_checkpoints(life.run).whole)
        self.finished = code == 0

    def _note_answer(self, fault: Fault, entry: Told, life: Life, code: int, *, ends: bool) -> None:
        entry.answer = fault.answer(life).replace(f"{life.run.directory}/", "")
        if isinstance(fault, Before):
            entry.recovery_s = _since(entry.at, life.first_step_at)
        elif ends:
            entry.code, entry.gone_s, entry.repeated = code, _since(entry.at, life.gone_at), self._unsaved(life)
            self._waiting.append(entry)

    def _note_recovery(self, life: Life) -> None:
        if life.first_step_at is None:
            return
        for entry in self._waiting:
            entry.recovery_s = _since(entry.at, life.first_step_at)
        self._waiting.clear()

    def _unsaved(self, life: Life) -> int:
        """The steps of a life that are in no whole checkpoint."""
        steps = read_lines(life.run.directory / "metrics.jsonl").steps
        return max(steps, default=0) - read_checkpoints(life.run).newest if life.start_step is not None else 0


def _faults(chapter: Chapter) -> list[Fault]:
    return [*chapter.before, *chapter.meanwhile, *([chapter.ending] if chapter.ending else [])]


def _since(then: float, now: float | None) -> float | None:
    return None if now is None else round(max(0.0, now - then), 1)
