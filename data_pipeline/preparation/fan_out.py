"""Independent tasks, in this process or in those of an executor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from typing import TypeVar

T = TypeVar("T")


def completed(
    executor: Executor | None, function: Callable[..., T], tasks: Sequence[tuple[object, ...]]
) -> Iterator[tuple[int, T]]:
    """(number, result) of ``function(*task)`` for every task, in the order in which they are done.

    What a task raises is raised here. The others are then still the executor's: its owner may give them up.
    """
    if executor is None:
        yield from ((number, function(*task)) for number, task in enumerate(tasks))
        return
    futures = {executor.submit(function, *task): number for number, task in enumerate(tasks)}
    # None is cancelled here: a pool of Python 3.11 whose process ends meanwhile fails at futures that others cancelled.
    for future in as_completed(futures):
        yield futures[future], future.result()
