"""Things that happen to a life which must go on as if nothing was."""

from __future__ import annotations

import datetime
import json
import random
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from demo import HANG_S, RANKS, environment
from fault import Before, Meanwhile, Moment, NotYetError, Scene
from life import Life

from trine.pretrain.lock_holder import Holder, encode
from trine.pretrain.run_lock import LOCK

DATEFUDGE = "datefudge"
"""Debian's package that shows programs another time of day. libfaketime also meddles with sleeping, which Python's
waits do not survive."""


class SecondStart(Meanwhile):
    """The same command once more, while the first one runs: refused, and the first does not notice."""

    kind = "second start"

    def inject(self, life: Life) -> str:
        life.wait(lambda: life.start_step is not None, "it began to train")
        run, console = self.scene.run, life.console_path.with_suffix(".second")
        before = _contents(run.directory)
        with console.open("wb") as out:
            second = subprocess.Popen(run.command(), stdout=out, stderr=out, start_new_session=True, env=environment())
        try:
            life.wait(lambda: second.poll() is not None, "the second start was answered", slowly=True)
        finally:
            second.kill()
            second.wait()
        self._code, self._said, self._before, self._after = second.returncode, console.read_text(), before, _contents(run.directory)
        at = life.step
        life.wait(lambda: life.step > at, "it went on")
        return "refused" if self._code == 2 else "not refused"

    def answer(self, life: Life) -> str:
        return f"exit code {self._code}: {self._said.strip().splitlines()[-1].removeprefix('trine: ')}"

    def broken(self, life: Life) -> Iterable[str]:
        if self._code != 2 or "is in use by process" not in self._said:
            yield f"the second start ended with {self._code}: {self._said[-300:]!r}"
        if self._before != self._after:
            yield "the second start has changed the run's configuration"


class PausedRank(Meanwhile):
    """A rank stands still for less than a hang may last."""

    kind = "rank paused for a while"

    def __init__(self, dice: random.Random, scene: Scene) -> None:
        super().__init__(dice, scene)
        self.moment, self.rank, self._seconds = Moment(dice, scene), dice.randrange(RANKS), dice.uniform(0.1, 0.4) * HANG_S

    def inject(self, life: Life) -> str:
        life.wait_for_ranks()
        when = self.moment.wait(life, 1)
        life.stop_rank(self.rank)
        time.sleep(self._seconds)
        life.continue_rank(self.rank)
        at = life.step
        life.wait(lambda: life.step > at, "it went on")
        return f"rank {self.rank} for {self._seconds:.1f} s, {when}"


class WrongClock(Meanwhile):
    """The whole life sees another time of day."""

    kind = "wrong clock"

    def __init__(self, dice: random.Random, scene: Scene) -> None:
        super().__init__(dice, scene)
        self._hours = dice.choice((-365 * 24, -1, 1, 365 * 24))

    def variables(self) -> dict[str, str]:
        # It takes seconds away.
        return {"LD_PRELOAD": str(datefudge_library()), "DATEFUDGE": str(-3600 * self._hours)}

    def inject(self, life: Life) -> str:
        life.wait(lambda: life.start_step is not None, "it began to train")
        attempts = json.loads((self.scene.run.directory / "attempts.json").read_bytes())
        seen = datetime.datetime.strptime(attempts[-1]["started"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
        self._off = (seen - time.time()) / 3600 - self._hours
        return f"{self._hours:+,} hours"

    def broken(self, life: Life) -> Iterable[str]:
        if abs(self._off) > 0.2:
            yield f"the clock was not wrong as it should: {self._off:+.1f} hours from that"


class LockOfAnotherHost(Before):
    """A host that is gone has left its lock, and nobody here can ask for its process."""

    kind = "lock of a lost host"

    def inject(self) -> str:
        path = self.scene.run.directory / LOCK
        if not path.parent.exists():
            raise NotYetError
        holder = Holder("0" * 32, "lost-host", "another boot", 4711, 1.0, None)
        path.write_bytes(encode(holder, 17))
        return str(holder)

    def answer(self, life: Life) -> str:
        return "taken over: no sign of life"

    def broken(self, life: Life) -> Iterable[str]:
        if "is taken over from process 4711 on host lost-host: no sign of life" not in life.console:
            yield "it is not told that the lock of lost-host was taken over"


def datefudge_library() -> Path:
    """Where it is. Raises RuntimeError where it is not."""
    found = sorted(Path("/usr/lib").glob(f"**/{DATEFUDGE}/{DATEFUDGE}.so"))
    if not found or shutil.which(DATEFUDGE) is None:
        raise RuntimeError(f"the wrong clock needs {DATEFUDGE}: apt-get install {DATEFUDGE}")
    return found[0]


def _contents(directory: Path) -> tuple[bytes, ...]:
    return tuple((directory / name).read_bytes() for name in ("config.yaml",))
