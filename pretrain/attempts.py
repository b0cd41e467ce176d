"""The times that a run was started, how long it was up, and how much of that was work that counts: its goodput."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

NAME = "attempts.json"
_WRITE_EVERY_S = 10.0


@dataclass
class Attempt:
    """One start of a run."""

    started: str
    """Local time, for people; nothing is computed from it, as clocks may be wrong."""
    host: str
    first_step: int
    last_step: int
    up_s: float = 0.0
    """How long it was up, to some ten seconds where it was killed."""
    end: str = "killed"
    """How it ended; what stands here until it does so by itself."""


@dataclass
class Goodput:
    """Productive time is that of steps that are part of the run: not repeated after a failure, and not skipped."""

    productive_s: float
    up_s: float
    """Time in which ranks were up, over all attempts."""

    @property
    def fraction(self) -> float:
        """Productive time / time up."""
        return min(1.0, self.productive_s / self.up_s) if self.up_s > 0 else 0.0


@dataclass
class Attempts:
    """Keeps ``attempts.json``. Only one rank of a run holds one."""

    directory: Path
    earlier: list[Attempt]
    current: Attempt
    productive_s: float
    """Seconds of the steps up to here, whichever attempt took them; a checkpoint carries it."""
    _clock: float = field(default_factory=lambda: time.monotonic() - _age())
    """When this process began: what it takes to start is time in which nothing is trained."""
    _written: float = 0.0
    _told: bool = False

    @staticmethod
    def begin(directory: Path, step: int, productive_s: float) -> Attempts:
        """Note a new start at ``step``."""
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        current = Attempt(started, socket.gethostname(), first_step=step, last_step=step)
        attempts = Attempts(directory, _read(directory / NAME), current, productive_s)
        attempts.write()
        return attempts

    @property
    def number(self) -> int:
        """Of this attempt, from 1."""
        return len(self.earlier) + 1

    def step_done(self, step: int, seconds: float, *, counts: bool) -> None:
        """Note a step."""
        self.current.last_step = step
        self.productive_s += seconds if counts else 0.0
        if time.monotonic() - self._written > _WRITE_EVERY_S:
            self.write()

    def goodput(self) -> Goodput:
        """Of the whole run until now."""
        up = sum(attempt.up_s for attempt in self.earlier) + time.monotonic() - self._clock
        return Goodput(self.productive_s, up)

    def end(self, how: str) -> None:
        """Note how this attempt ends."""
        self.current.end = how
        self.write()

    def write(self) -> None:
        """Bring everything to the disk, as is done every ten seconds and with each checkpoint."""
        self._written = time.monotonic()
        self.current.up_s = round(self._written - self._clock, 3)
        document = [asdict(attempt) for attempt in (*self.earlier, self.current)]
        part = self.directory / f"{NAME}.part"
        try:
            part.write_text(json.dumps(document, indent=1) + "\n")
            part.replace(self.directory / NAME)
        except OSError as error:  # a full disk, say; statistics are nothing to end a run for
            if not self._told:
                logger.warning("%s cannot be written for now: %s", self.directory / NAME, error.strerror)
            self._told = True


def _read(path: Path) -> list[Attempt]:
    try:
        lines: list[dict[str, Any]] = json.loads(path.read_bytes())
        return [Attempt(**line) for line in lines]
    except (OSError, ValueError, TypeError):  # none yet, or one that a full disk cut short: only statistics are lost
        return []


def _age() -> float:
    """Seconds since this process began, by a clock that nobody sets; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
