"""A disk without room, for a while and at the worst moments."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterable

from fault import Ending, Meanwhile, Moment, Scene
from life import END_S, Life
from remains import newest_step

from trine.pretrain.exit_state import STOPPED

_GOES_ON = "the run goes on (checkpoint.on_failure=continue)"


class FullForSomeSaves(Meanwhile):
    """Saves fail, the run goes on; when there is room again it saves again."""

    kind = "disk full for some saves"

    def __init__(self, dice: random.Random, scene: Scene) -> None:
        super().__init__(dice, scene)
        self.moment = Moment(dice, scene)
        self._failures, self._room = dice.choice((1, 2)), int(dice.choice((0.0, 0.5)) * scene.pace.checkpoint_bytes)

    def inject(self, life: Life) -> str:
        when, disk, run = self.moment.wait(life, 1), self.scene.disk, self.scene.run
        disk.fill(self._room)
        at = life.step
        try:
            life.wait(lambda: life.console.count(_GOES_ON) >= self._failures, f"{self._failures} saves failed")
        finally:
            disk.clear()
        life.wait(lambda: newest_step(run) > at, "a save had room again")
        return f"{life.console.count(_GOES_ON)} saves failed, {self._room / 2**20:.0f} MiB left, {when}"


class FullForLong(Meanwhile):
    """No room for longer than anything waits that writes now and then."""

    kind = "disk full for a long time"
    _seconds = 15.0

    def inject(self, life: Life) -> str:
        Moment(self.dice, self.scene).wait(life, 1)
        disk, run = self.scene.disk, self.scene.run
        disk.fill()
        at, until = life.step, time.monotonic() + self._seconds
        try:
            life.wait(lambda: time.monotonic() > until, "the disk was full for long", slowly=True)
        finally:
            disk.clear()
        life.wait(lambda: newest_step(run) > at, "a save had room again")
        return f"{self._seconds:.0f} s, {life.console.count(_GOES_ON)} saves failed"


class FullAtTheEnd(Ending):
    """The last save of a life that was asked to stop has no room: the run says so and fails.

    What another save gives back in the last moment may do for it after all.
    """

    kind = "disk full at the last save"
    codes, outcomes = (1, STOPPED), (None, "failed", "stopped")
    says = r"rank \d of \d failed: checkpoint \S+ (could not be written|is not begun)|stopped at step \d+, since a signal"

    def __init__(self, dice: random.Random, scene: Scene) -> None:
        super().__init__(dice, scene)
        self.moment = Moment(dice, scene)

    def inject(self, life: Life, steps: int) -> str:
        when, disk = self.moment.wait(life, steps), self.scene.disk
        disk.fill()
        life.process.send_signal(signal.SIGTERM)
        self.struck = time.monotonic()
        while life.process.poll() is None and time.monotonic() - self.struck < END_S:
            disk.fill()
            time.sleep(0.01)
        return when

    def clean_up(self) -> None:
        self.scene.disk.clear()


class FullFromTheStart(Ending):
    """A life that begins without any room says so in one sentence."""

    kind = "disk full at the start"
    lets_begin = lets_train = False
    says = r"rank \d of \d failed: .+\(No space left on device\): make room"

    def prepare(self) -> None:
        self.scene.disk.fill()

    def inject(self, life: Life, steps: int) -> str:
        return "0 MiB left"

    def clean_up(self) -> None:
        self.scene.disk.clear()

    def broken(self, life: Life) -> Iterable[str]:
        yield from super().broken(life)
        if not life.sentences:
            yield "trine has said nothing"
