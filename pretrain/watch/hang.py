"""A rank that no longer moves is named, and the run ends, instead of waiting for it.

A thread on each rank looks at what the main thread does, which may sit in a collective or in a read for ever, and
tells the other ranks. The first that sees its own main thread stand still judges: it reads what all have told, and
the run ends with one sentence about the ranks that the others wait for. No clocks of different hosts are compared.

From the moment when a rank has stood still for its limit until all ranks have ended it takes 10 s where all answer,
and at most 40 s; with limits below 20 s it takes less.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ...configs.errors import RunError
from ..place import Place
from .board import Board, StoreSilentError, Verdict
from .pulse import PATIENCE, Moment, Pulse
from .verdict import Record, lost_store, verdict

_INTERVAL_S = 5.0
_QUIET_INTERVALS, _QUIET_S = 3, 2.0
_CLOSE_S = 1.0
_LATE_S = 1.0
_LEAVE_S = 5.0
_POLL_S = 0.25
_STANDARD_ERROR = 2


class HangWatchdog:
    """Watches the main thread of this rank for standing still.

    Args:
        pulse: what the main thread tells.
        seconds: for how long it may stand still, but for the phases of ``pulse.PATIENCE``; 0 watches nothing.
        store_address: host and port of the run's store, which must be there when the watch starts; None for one rank.
        tell: prints a line on the console, where the user sees one of all ranks.
        end: ends the process without the help of the main thread; where it returns or hangs, ``os._exit(1)`` does.
        log: the log of this rank, to which the sentence and the stacks of all threads are appended; standard error
            where it is None.
        attempt: the same on all ranks, and another for each start that uses the same store.
    """

    def __init__(
        self,
        pulse: Pulse,
        place: Place,
        seconds: float,
        store_address: tuple[str, int] | None,
        *,
        tell: Callable[[str], None],
        end: Callable[[RunError], object],
        log: Path | None = None,
        attempt: str | None = None,
    ) -> None:
        self._pulse, self._place, self._seconds = pulse, place, seconds
        self._address = store_address if place.world_size > 1 else None
        self._tell, self._end, self._log_path = tell, end, log
        self._attempt = attempt or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._interval = min(seconds / 4, _INTERVAL_S)
        self._quiet = max(_QUIET_INTERVALS * self._interval, _QUIET_S)
        self._host = socket.gethostname()
        self._closing, self._finishes = threading.Event(), False
        self._decision = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="trine-watch", daemon=True)
        self._board: Board | None = None
        self._log: BinaryIO | None = None
        self._counts_from = time.monotonic()
        self._noticed: float | None = None
        self._beat = 0

    def start(self) -> None:
        """Begin to watch."""
        if not self._seconds:
            return
        if self._log_path is not None:
            # Now, for a file system that hangs later opens nothing.
            self._log = self._log_path.open("ab", buffering=0)
        if self._address is not None:
            place = self._place
            self._board = Board(self._address, place.rank, place.world_size, self._attempt, self._quiet)
            self._board.publish(self._record(), wait=True)
        self._thread.start()

    def close(self) -> None:
        """End the watch; ranks that go on are told that this one has ended.

        Does not return where the watch is about to end the process: what the main thread has met then, such as a
        connection that a rank lost by ending, only follows from that.
        """
        with self._decision:
            self._closing.set()
        if self._thread.is_alive():
            self._thread.join(None if self._finishes else _CLOSE_S)
        if self._board is not None:
            self._board.close(self._record(ended=True), _CLOSE_S)
            self._board = None

    def __enter__(self) -> HangWatchdog:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _watch(self) -> None:
        while not self._sleep(self._until_next_look()):
            self._look()

    def _sleep(self, seconds: float) -> bool:
        """Wait; whether the watch is to end."""
        due = time.monotonic() + seconds
        closing = self._closing.wait(seconds)
        now = time.monotonic()
        if now - due > max(self._interval, _LATE_S):
            # This whole process was stopped, and its main thread could not move: the time does not count.
            self._counts_from = now
        return closing

    def _until_next_look(self) -> float:
        left = self._limit() - self._standing()
        return min(self._interval, left) if left > 0 else self._interval

    def _look(self) -> None:
        board = self._board
        if board is not None:
            board.publish(self._record())
            if board.verdict is not None:
                self._finish(board.verdict)
        if not self._overdue():
            self._noticed = None
        elif board is None:
            self._judge_alone()
        else:
            self._judge_with(board)

    def _judge_alone(self) -> None:
        line = verdict({0: self._record()}, [], 1)
        if line is not None:
            self._finish(Verdict(line, speaker=0, answering=1))

    def _judge_with(self, board: Board) -> None:
        """Find out with the others who hangs, and end if somebody does."""
        if self._noticed is None:
            self._noticed = time.monotonic()
        waited = time.monotonic() - self._noticed > self._quiet + 2 * self._interval
        try:
            if not (board.claim() or waited):
                return
            found = self._found(board)
            if found is None:
                board.give_up_claim()
                return
            found = board.propose(found)
        except StoreSilentError:
            if not self._overdue() or self._closing.is_set():
                return
            found = self._without_store(board)
        self._finish(found)

    def _found(self, board: Board) -> Verdict | None:
        """What is wrong, by two looks at what all ranks tell; None while nothing is, or no longer."""
        before, deadline = board.read(), time.monotonic() + self._quiet
        while True:
            if self._sleep(self._interval / 2):
                return None
            board.publish(self._record())
            records = board.read()
            silent = self._silent(before, records)
            if not silent or time.monotonic() > deadline:
                break
        line = verdict(records, silent, self._place.world_size) if self._overdue() else None
        there = [rank for rank, record in records.items() if rank not in silent and not record.ended]
        return Verdict(line, min(there, default=self._place.rank), len(there)) if line is not None else None

    def _silent(self, before: dict[int, Record], records: dict[int, Record]) -> list[int]:
        def is_heard(rank: int) -> bool:
            record = records.get(rank)
            return record is not None and (record.ended or rank not in before or record.beat != before[rank].beat)

        return [rank for rank in range(self._place.world_size) if not is_heard(rank)]

    def _without_store(self, board: Board) -> Verdict:
        # Who else is there cannot be known: one rank of each host tells, and on that of rank 0 the next one.
        speaks = self._place.local_rank == 0 or self._place.rank == 1
        line = lost_store(board.place, self._place.rank, self._record())
        return Verdict(line, self._place.rank if speaks else -1, answering=1)

    def _finish(self, found: Verdict) -> None:
        """Tell what was found and end the process, also where console and log belong to a file system that hangs."""
        with self._decision:
            self._finishes = not self._closing.is_set()
        if not self._finishes:
            return
        report: list[Callable[[], object]] = [lambda: self._note(found.line)]
        if found.speaker == self._place.rank:
            report.append(lambda: self._tell(found.line))
        _within(_LEAVE_S, *report)
        if self._board is not None and found.answering > 1:
            self._wait_until_told(self._board, found.answering)
        _within(_LEAVE_S, lambda: self._leave(found.line))
        os._exit(1)

    def _note(self, line: str) -> None:
        log = self._log.fileno() if self._log is not None else _STANDARD_ERROR
        # Not by logging, whose lock the main thread may hold.
        with suppress(OSError):  # a full disk
            os.write(log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} ERROR {__name__}: {line}\n".encode())
        faulthandler.dump_traceback(log, all_threads=True)

    def _wait_until_told(self, board: Board, answering: int) -> None:
        """Wait, but not long, for the ranks that answer: the first to leave takes the others or the store with it."""
        deadline = time.monotonic() + self._quiet
        try:
            board.acknowledge()
            while board.acknowledged() < answering and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            if self._place.rank == 0:
                time.sleep(2 * _POLL_S)  # the store may be in this process, and the others ask it a last time
        except StoreSilentError:
            return

    def _leave(self, line: str) -> None:
        try:
            raise RunError(line)
        except RunError as error:  # launchers want to see it handled
            self._end(error)

    def _record(self, *, ended: bool = False) -> Record:
        self._beat += 1
        moment = self._pulse.moment
        phase, step, turn, _ = moment
        standing = self._standing(moment)
        return Record(
            self._host, phase, step, turn, self._pulse.finished,
            seconds=round(standing, 1),
            overdue=standing >= self._limit(moment),
            beat=self._beat,
            ended=ended,
        )  # fmt: skip

    def _overdue(self) -> bool:
        moment = self._pulse.moment
        return self._standing(moment) >= self._limit(moment)

    def _standing(self, moment: Moment | None = None) -> float:
        """For how long the main thread has not moved, as far as this process ran."""
        entered = (moment or self._pulse.moment)[3]
        return time.monotonic() - max(entered, self._counts_from)

    def _limit(self, moment: Moment | None = None) -> float:
        return self._seconds * PATIENCE.get((moment or self._pulse.moment)[0], 1.0)


def _within(seconds: float, *actions: Callable[[], object]) -> None:
    """Do things that may hang, beside each other, and go on without them after ``seconds``."""
    threads = [threading.Thread(target=action, daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
