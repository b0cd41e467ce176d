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

    What a task raises is raised here; of the others, those that have not begun are then given up.
    """
    if executor is None:
        yield from ((number, function(*task)) for number, task in enumerate(tasks))
        return
    futures = {executor.submit(function, *task): number for number, task in enumerate(tasks)}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        for future in futures:
            future.cancel()
