"""Why a run should stop before its end, and how its ranks come to agree on it."""

from __future__ import annotations

import signal
import time
from enum import IntEnum
from pathlib import Path

from .exit_state import REQUEUE, asked

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_received: list[int] = []


class Stop(IntEnum):
    """A request to stop. Where ranks have several, the largest counts."""

    NONE = 0
    TIME = 1
    """``train.max_wall_time`` has passed."""
    LAUNCHER = 2
    """The stop file holds ``REQUEUE``: the launcher sees its time limit coming."""
    SIGNAL = 3
    """SIGTERM, SIGUSR1 or SIGUSR2: what Slurm, a launcher or a person sends."""
    WISH = 4
    """The stop file is empty: somebody wants the run to end here."""

    @property
    def resumes(self) -> bool:
        """Whether whoever started the run should start it again."""
        return self is not Stop.WISH

    @property
    def reason(self) -> str:
        """In words."""
        return {
            Stop.NONE: "nothing",
            Stop.TIME: "train.max_wall_time has passed",
            Stop.LAUNCHER: "the launcher's time limit comes near",
            Stop.SIGNAL: "a signal asked for it",
            Stop.WISH: "the stop file asked for it",
        }[self]


def listen_to_signals() -> None:
    """From now on take SIGTERM, SIGUSR1 and SIGUSR2 for a request to stop after the step at hand."""
    for number in _SIGNALS:
        signal.signal(number, lambda received, _: _received.append(received))


class StopRequests:
    """What this rank knows of requests to stop."""

    def __init__(self, stop_file: Path | None, max_wall_time: float | None) -> None:
        """``stop_file`` is looked for by one rank of a run alone: the others give None."""
        self._file, self._limit = stop_file, max_wall_time
        self._started = time.monotonic()

    def seen(self) -> Stop:
        """The most important request that has reached this rank."""
        return max(self._from_signals(), self._from_file(), self._from_clock())

    def _from_signals(self) -> Stop:
        return Stop.SIGNAL if _received else Stop.NONE

    def _from_file(self) -> Stop:
        wanted = None if self._file is None else asked(self._file)
        if wanted is None:
            return Stop.NONE
        return Stop.LAUNCHER if wanted == REQUEUE else Stop.WISH

    def _from_clock(self) -> Stop:
        passed = self._limit is not None and time.monotonic() - self._started > self._limit
        return Stop.TIME if passed else Stop.NONE
