"""Requests to stop, by all ways that there are."""

from __future__ import annotations

import random
import signal
import time

from fault import Moment, Scene, Stopping, wait_while_starting
from life import Life

from trine.pretrain.exit_state import REQUEUE, STOP_FILE


class _Signal(Stopping):
    number = signal.SIGTERM

    def __init__(self, dice: random.Random, scene: Scene) -> None:
        super().__init__(dice, scene)
        self.moment = Moment(dice, scene)

    def inject(self, life: Life, steps: int) -> str:
        when = self.moment.wait(life, steps)
        life.process.send_signal(self.number)
        return when


class Terminate(_Signal):
    kind = "SIGTERM to the launcher"


class UserSignal(_Signal):
    kind = "SIGUSR1 to the launcher"
    number = signal.SIGUSR1


class TerminateTwice(_Signal):
    """The second signal comes while the ranks save."""

    kind = "SIGTERM twice"

    def __init__(self, dice: random.Random, scene: Scene) -> None:
        super().__init__(dice, scene)
        self._pause = dice.uniform(0.2, 1.2) * (scene.pace.step_s + scene.pace.save_s)

    def inject(self, life: Life, steps: int) -> str:
        when = super().inject(life, steps)
        time.sleep(self._pause)
        again = life.process.poll() is None
        if again:
            life.process.send_signal(self.number)
        return f"{when}, again after {self._pause:.2f} s" + ("" if again else ", when it had ended")


class TerminateWhileStarting(Stopping):
    """Ranks that do not listen yet just end; those that do make one step, save and stop."""

    kind = "SIGTERM while starting"
    lets_begin = lets_train = False
    codes, outcomes = (75, 128 + signal.SIGTERM), (None, "stopped")
    says = None

    def __init__(self, dice: random.Random, scene: Scene) -> None:
        super().__init__(dice, scene)
        self._after = dice.uniform(0.2, 1.0) * scene.pace.start_s

    def inject(self, life: Life, steps: int) -> str:
        when = wait_while_starting(life, self._after, steps)
        life.process.send_signal(signal.SIGTERM)
        return when


class StopFile(_Signal):
    """Empty it is a person's wish; a launcher writes that the run should be started again."""

    kind = "stop file"

    def __init__(self, dice: random.Random, scene: Scene) -> None:
        super().__init__(dice, scene)
        self._text = dice.choice(("", REQUEUE))
        self.resumes = bool(self._text)
        self.says = r"since the launcher's time limit comes near" if self._text else r"since the stop file asked for it"

    def inject(self, life: Life, steps: int) -> str:
        when = self.moment.wait(life, steps)
        (self.scene.run.directory / STOP_FILE).write_text(self._text)
        return f"{f'with {self._text!r}' if self._text else 'empty'}, {when}"


class WallTime(Stopping):
    """The limit may pass while the run still starts: then it makes one step."""

    kind = "max wall time"
    lets_train = False
    says = r"since train\.max_wall_time has passed"

    def __init__(self, dice: random.Random, scene: Scene) -> None:
        super().__init__(dice, scene)
        self._seconds = round(dice.uniform(0.5, 3.0), 2)

    def overrides(self) -> list[str]:
        return [f"train.max_wall_time={self._seconds}"]

    def inject(self, life: Life, steps: int) -> str:
        return f"{self._seconds} s"
