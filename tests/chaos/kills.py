"""Processes that die without a word."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterable

import psutil
from demo import RANKS
from fault import Ending, Moment, Scene, wait_while_starting
from life import Life


class _Kill(Ending):
    def __init__(self, dice: random.Random, scene: Scene) -> None:
        super().__init__(dice, scene)
        self.moment, self.rank = Moment(dice, scene), dice.randrange(RANKS)


class KillRank(_Kill):
    kind = "kill -9 of a rank"

    def inject(self, life: Life, steps: int) -> str:
        ranks = life.wait_for_ranks()
        when = self.moment.wait(life, steps)
        ranks[self.rank].kill()
        self.says = rf"rank {self.rank} of {RANKS} was killed by signal 9 \(SIGKILL\)"
        return f"rank {self.rank}, {when}"


class KillAllRanks(_Kill):
    """It also leaves the run's lock behind, which the next life must not wait for."""

    kind = "kill -9 of all ranks"
    says = rf"rank \d of {RANKS} was killed by signal 9 \(SIGKILL\)"

    def inject(self, life: Life, steps: int) -> str:
        ranks = life.wait_for_ranks()
        when = self.moment.wait(life, steps)
        for process in ranks.values():
            process.kill()
        return when


class KillLauncher(_Kill):
    kind = "kill -9 of the launcher"
    codes, outcomes = (-signal.SIGKILL,), (None,)

    def inject(self, life: Life, steps: int) -> str:
        when = self.moment.wait(life, steps)
        life.process.kill()
        return when

    def answer(self, life: Life) -> str:
        return "all ranks die with it"


class KillWhileStarting(_Kill):
    """Some time between the start of the command and the first step."""

    kind = "kill -9 while starting"
    lets_begin = lets_train = False

    def __init__(self, dice: random.Random, scene: Scene) -> None:
        super().__init__(dice, scene)
        self.after = dice.uniform(0.3, 1.0) * scene.pace.start_s
        self.victim = dice.choice(("a rank", "the launcher"))

    def inject(self, life: Life, steps: int) -> str:
        when = wait_while_starting(life, self.after, steps)
        if self.victim == "a rank":
            process = life.wait_for_ranks()[self.rank]
            process.kill()
            self.says = rf"rank {self.rank} of {RANKS} was killed by signal 9 \(SIGKILL\)"
        else:
            self.codes, self.outcomes = (-signal.SIGKILL,), (None,)
            life.process.kill()
        return f"{self.victim}, {when}"


class StopRank(_Kill):
    """A rank stands still, and nobody lets it go on."""

    kind = "SIGSTOP of a rank"

    def inject(self, life: Life, steps: int) -> str:
        self._stopped = life.wait_for_ranks()[self.rank]
        when = self.moment.wait(life, steps)
        self._stopped.send_signal(signal.SIGSTOP)
        self.says = rf"rank {self.rank} on host \S+ (does not answer|hangs)"
        return f"rank {self.rank}, {when}"

    def broken(self, life: Life) -> Iterable[str]:
        yield from super().broken(life)
        if psutil.pid_exists(self._stopped.pid) and self._stopped.is_running():
            yield f"rank {self.rank} is still stopped there, as process {self._stopped.pid}"
