"""One life of the run: the command, from its start until its last process is gone."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from demo import RANKS, Run, environment

START_S, END_S, LONG_S = 300.0, 240.0, 1500.0
"""Deadlines: a start, and an end, take seconds on a machine that does nothing else; a whole run less than a minute."""
_POLL_S = 0.005
_TAIL = 4096
_STOPPED_S, _RUNNING_S = 2.0, 0.1
_MARK = "TRINE_CHAOS"
_BANNER = r"^  run +\S+, (?:resuming from \S*step-(\d+)|from the first step)"
_PR_SET_PDEATHSIG = 1


class LifeError(Exception):
    """The life does not do what the fault needs."""


class Life:
    """A started command, watched by looking at its folder and its console."""

    def __init__(
        self, run: Run, number: int, console: Path, *, overrides: Sequence[str] = (), variables: Mapping[str, str] = {}
    ) -> None:
        self.run, self.number, self.console_path = run, number, console
        self._mark = f"{os.getpid()}-{number}-{console.name}"
        self._state_before = _identity(run.directory / "exit_state.json")
        self.started = time.monotonic()
        self.first_step_at: float | None = None
        self.gone_at: float | None = None
        self._start_step: int | None = None
        with console.open("wb") as out:
            self.process = subprocess.Popen(
                run.command(*overrides), stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True,
                env=environment() | {_MARK: self._mark} | dict(variables), preexec_fn=_end_with_harness,
            )  # fmt: skip

    @property
    def console(self) -> str:
        """What it has printed so far."""
        return self.console_path.read_text(errors="replace")

    @property
    def sentences(self) -> list[str]:
        """The lines that trine has addressed to its user."""
        return [line for line in self.console.splitlines() if line.startswith("trine: ")]

    @property
    def start_step(self) -> int | None:
        """The step from which it goes on; None before it has told."""
        if self._start_step is None:
            told = re.search(_BANNER, self.console, re.MULTILINE)
            self._start_step = int(told[1] or 0) if told else None
        return self._start_step

    @property
    def step(self) -> int:
        """The last step that it has done, as far as it has told; 0 before it begins."""
        start = self.start_step
        if start is None:
            return 0
        told = [start]
        for path, pattern in (
            (self.run.directory / "metrics.jsonl", rb'"step": (\d+), "loss"'),
            (self.console_path, rb"^step (\d+)/\d+ \|"),
        ):
            told += [int(found) for found in re.findall(pattern, _tail(path), re.MULTILINE)]
        if max(told) > start and self.first_step_at is None:
            self.first_step_at = time.monotonic()
        return max(told)

    @property
    def left_state(self) -> dict[str, object] | None:
        """``exit_state.json``, if it is of this life."""
        path = self.run.directory / "exit_state.json"
        if not path.exists() or _identity(path) == self._state_before:
            return None
        state: dict[str, object] = json.loads(path.read_bytes())
        return state

    @property
    def keeps_old_state(self) -> bool:
        """Whether the word of the life before still stands there."""
        return self._state_before is not None and _identity(self.run.directory / "exit_state.json") == self._state_before

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks that are there."""
        found: dict[int, psutil.Process] = {}
        for process in self.processes():
            with suppress(psutil.Error, KeyError, ValueError):
                if "trine.launch.worker" in process.cmdline():
                    found[int(process.environ()["RANK"])] = process
        return found

    def processes(self) -> list[psutil.Process]:
        """Everything that this life has started and that has not ended, whoever its parent is by now."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def wait(self, condition: Callable[[], object], what: str, *, seconds: float = START_S, slowly: bool = False) -> None:
        """Wait for ``condition`` while the life goes on; ``slowly`` stops a rank most of the time meanwhile.

        Raises LifeError where the life ends first, or where it takes too long.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                raise LifeError(f"life {self.number} has ended ({self.process.returncode}) before {what}")
            if time.monotonic() > deadline:
                raise LifeError(f"life {self.number}: {what} did not come about in {seconds:.0f} s")
            _ = self.step
            if slowly:
                self._hold_back()
            time.sleep(_POLL_S)

    def wait_for_ranks(self) -> dict[int, psutil.Process]:
        """All ranks, when they are there."""
        self.wait(lambda: len(self.ranks()) == RANKS, "all ranks were there")
        return self.ranks()

    def wait_ended(self, seconds: float = END_S) -> int:
        """Wait until no process is left; returns the exit code, or raises LifeError after killing what is left."""
        try:
            deadline = time.monotonic() + seconds
            while self.process.poll() is None or self.processes():
                if time.monotonic() > deadline:
                    left = [f"{p.pid} {' '.join(p.cmdline())[:80]}" for p in self.processes()]
                    raise LifeError(f"life {self.number} does not end; after {seconds:.0f} s there are {left}")
                _ = self.step
                time.sleep(0.02)
            self.gone_at = time.monotonic()
            return self.process.returncode
        finally:
            self.kill()

    def stop_rank(self, rank: int) -> None:
        """Stop a rank with SIGSTOP."""
        self.ranks()[rank].send_signal(signal.SIGSTOP)

    def continue_rank(self, rank: int) -> None:
        """Let a stopped rank go on."""
        with suppress(psutil.NoSuchProcess, KeyError):
            self.ranks()[rank].send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill what is left."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()

    def _hold_back(self) -> None:
        rank = RANKS - 1
        with suppress(KeyError, psutil.NoSuchProcess):
            self.stop_rank(rank)
            time.sleep(_STOPPED_S)
            self.continue_rank(rank)
            time.sleep(_RUNNING_S)


def _end_with_harness() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _tail(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            return file.read()
    except FileNotFoundError:
        return b""
