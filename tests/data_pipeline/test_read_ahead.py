"""Reading ahead changes when jobs run and nothing else: their order, their errors and how often each runs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from trine.data_pipeline.read_ahead import Job, ReadAhead

JOBS = 4
"""Jobs of each step, whose position is the number of its first job."""
PATIENCE = 30.0
"""Seconds after which something that must happen is given up."""

Make = Callable[..., ReadAhead[int]]


class Recorder:
    """Jobs that give their number, and what happened to them."""

    def __init__(self) -> None:
        self.runs: Counter[int] = Counter()
        self.failing: set[int] = set()
        self.asked = 0
        self.asked_when_handed_out: dict[int, int] = {}
        self._lock = threading.Lock()

    def jobs_of_step(self, position: int) -> Iterator[Job[int]]:
        for number in range(position, position + JOBS):
            self.asked_when_handed_out[number] = self.asked
            yield partial(self._run, number)

    def _run(self, number: int) -> int:
        with self._lock:
            self.runs[number] += 1
        if number in self.failing:
            raise KeyError(number)
        return number

    def ask(self, call: Job[int]) -> int:
        self.asked += 1
        return call()


@pytest.fixture
def jobs() -> Recorder:
    return Recorder()


@pytest.fixture
def make(jobs: Recorder) -> Iterator[Make]:
    """Read ahead in the recorder's jobs; closed at the end."""
    opened: list[ReadAhead[int]] = []

    def read_ahead(threads: int, depth: int = 6) -> ReadAhead[int]:
        opened.append(ReadAhead(jobs.jobs_of_step, lambda position: position + JOBS, threads, depth))
        return opened[-1]

    yield read_ahead
    for one in opened:
        one.close()


def step(ahead: ReadAhead[int], position: int) -> list[int]:
    return [call() for call in ahead.step(position, JOBS)]


every_number_of_threads = pytest.mark.parametrize("threads", [0, 1, 5])


@every_number_of_threads
@pytest.mark.parametrize("depth", [1, 3, 50])
def test_results_come_in_order_and_each_job_runs_once(make: Make, jobs: Recorder, threads: int, depth: int) -> None:
    ahead = make(threads, depth)
    results = [number for position in range(0, 100, JOBS) for number in step(ahead, position)]
    assert results == list(range(100))
    ahead.close()
    assert set(jobs.runs.values()) == {1}
    assert set(range(100)) <= set(jobs.runs)


@every_number_of_threads
def test_steps_may_be_anywhere(make: Make, threads: int) -> None:
    ahead = make(threads)
    for position in (40, 44, 8, 12, 12, 0, 100, 104):
        assert step(ahead, position) == list(range(position, position + JOBS))


@every_number_of_threads
def test_a_step_that_was_left_half_way_shifts_nothing(make: Make, threads: int) -> None:
    ahead = make(threads)
    calls = ahead.step(0, JOBS)
    assert [next(calls)(), next(calls)()] == [0, 1]
    assert step(ahead, 4) == [4, 5, 6, 7]
    ahead.step(8, JOBS)
    assert step(ahead, 12) == [12, 13, 14, 15]


@every_number_of_threads
def test_errors_arrive_in_their_place_and_reading_goes_on(make: Make, jobs: Recorder, threads: int) -> None:
    jobs.failing = {1, 2, 9}
    ahead = make(threads)
    results: list[int | str] = []
    for position in (0, 4, 8):
        for call in ahead.step(position, JOBS):
            try:
                results.append(call())
            except KeyError as error:
                results.append(f"failed {error}")
    assert results == [0, "failed 1", "failed 2", 3, 4, 5, 6, 7, 8, "failed 9", 10, 11]
    assert max(jobs.runs.values()) == 1


@pytest.mark.parametrize("depth", [1, 3, 7])
def test_no_more_than_the_depth_is_begun_before_it_is_asked_for(make: Make, jobs: Recorder, depth: int) -> None:
    ahead = make(2, depth)
    for position in range(0, 40, JOBS):
        for call in ahead.step(position, JOBS):
            jobs.ask(call)
    # When job number n is handed to a thread, the one being asked for is at most depth - 1 before it, and no more.
    for number, asked in jobs.asked_when_handed_out.items():
        assert asked == max(1, number + 2 - depth)


def test_without_threads_nothing_is_read_ahead(make: Make, jobs: Recorder) -> None:
    ahead = make(0)
    for number, call in enumerate(ahead.step(0, JOBS)):
        assert len(jobs.runs) == number
        call()


def test_threads_work_while_nobody_asks() -> None:
    """All 5 jobs wait for each other: this ends only if 5 threads run them at once, 4 of them ahead."""
    together = threading.Barrier(5, timeout=PATIENCE)

    def jobs_of_step(position: int) -> Iterator[Job[int]]:
        return (together.wait for _ in range(5))

    ahead = ReadAhead(jobs_of_step, lambda position: position + 1, 5, 5)
    first = next(ahead.step(0, 5))
    assert first() in range(5)
    ahead.close()


def test_what_was_read_ahead_can_be_forgotten(make: Make, jobs: Recorder) -> None:
    ahead = make(2)
    assert step(ahead, 0) == [0, 1, 2, 3]
    jobs.failing = {5}
    ahead.forget()
    calls = ahead.step(4, JOBS)
    assert next(calls)() == 4
    with pytest.raises(KeyError):
        next(calls)()


def test_closing_ends_the_threads(make: Make, jobs: Recorder) -> None:
    before = set(threading.enumerate())
    ahead = make(3, depth=50)
    assert next(ahead.step(0, JOBS))() == 0
    assert len(set(threading.enumerate()) - before) == 3
    ahead.close()
    assert set(threading.enumerate()) <= before
    assert set(jobs.runs.values()) == {1}
    # Nothing is left to end.
    ahead.close()
    make(0).close()


@every_number_of_threads
def test_waiting_is_counted(make: Make, threads: int) -> None:
    ahead = make(threads)
    assert ahead.waited == 0
    step(ahead, 0)
    once = ahead.waited
    step(ahead, 4)
    assert 0 < once < ahead.waited
