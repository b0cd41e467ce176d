"""Microbatches read by threads before they are asked for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
Job = Callable[[], T]


class ReadAhead(Generic[T]):
    """Runs the jobs of the steps to come, a bounded number at a time and in their order.

    The jobs of a step are a function of its position alone, so what lies ahead is known and nothing has to be kept of
    it in a checkpoint. Threads suffice: copying, checksums and reading all release the interpreter.
    """

    def __init__(
        self,
        jobs_of_step: Callable[[int], Iterator[Job[T]]],
        next_position: Callable[[int], int],
        threads: int,
        depth: int,
    ) -> None:
        """``next_position`` gives the position of the step that follows one; ``depth`` jobs are begun at most before
        they are asked for. With no ``threads`` every job runs when it is asked for."""
        self._jobs_of_step, self._next_position = jobs_of_step, next_position
        self._depth = depth
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead") if threads else None
        self._planned: Iterator[Job[T]] = iter(())
        self._running: deque[Future[T]] = deque()
        self._position: int | None = None
        self._uncalled = 0
        self.waited = 0.0
        """Seconds that callers have waited for jobs."""

    def step(self, position: int, count: int) -> Iterator[Job[T]]:
        """For each of the ``count`` jobs of the step at ``position``, in order, a call with its result or exception.

        Once the next step is begun, none of them may be called. Steps need not follow each other, but reading ahead
        begins anew where they do not, or where some calls were left out.
        """
        if position != self._position or self._uncalled:
            self._begin_anew(position)
        self._position = self._next_position(position)
        self._uncalled = count
        return (self._timed for _ in range(count))

    def forget(self) -> None:
        """Begin anew at the next step: what the jobs ahead gave is no longer what they would give."""
        self._position = None

    def close(self, *, wait: bool = True) -> None:
        """Stop reading ahead and end the threads, without ``wait`` when what they read now has come."""
        if self._threads is not None:
            self._threads.shutdown(wait, cancel_futures=True)

    def _begin_anew(self, position: int) -> None:
        for future in self._running:
            future.cancel()
        self._running.clear()
        self._planned = self._jobs_from(position)

    def _jobs_from(self, position: int) -> Iterator[Job[T]]:
        while True:
            yield from self._jobs_of_step(position)
            position = self._next_position(position)

    def _timed(self) -> T:
        self._uncalled -= 1
        started = time.perf_counter()
        try:
            return self._next()
        finally:
            self.waited += time.perf_counter() - started

    def _next(self) -> T:
        if self._threads is None:
            return next(self._planned)()
        while len(self._running) < self._depth:
            self._running.append(self._threads.submit(next(self._planned)))
        return self._running.popleft().result()
