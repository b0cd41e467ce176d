"""What some ranks found, told to all of them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..configs.errors import RunError, UsageError
from .topology import Topology

logger = logging.getLogger(__name__)

_FIRST_LOOK_S, _SLOWEST_LOOK_S = 0.002, 0.5

K = TypeVar("K")
V = TypeVar("V")


def union_over_ranks(found: dict[K, V], topology: Topology) -> dict[K, V]:
    """What any rank of the run found, the same and in the same order on every rank; all of them must call it.

    A rank that finds something other ranks do not see, such as a node's bad copy of a file, is thus believed by all.
    Costs one small sum while nobody finds anything.
    """
    finders = torch.tensor([len(found)], device=topology.device)
    dist.all_reduce(finders)
    if not finders.item():
        return {}
    merged: dict[K, V] = {}
    for one in from_every_rank(found, topology):
        for key, value in one.items():
            merged.setdefault(key, value)
    return merged


def from_first_rank(value: V, topology: Topology) -> V:
    """What rank 0 calls ``value``, on every rank; all of them must call it."""
    box = [value if topology.rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    told: Any = box[0]
    return told  # type: ignore[no-any-return]


def done_by_first_rank(action: Callable[[], V]) -> V:
    """Have rank 0 do something, and give every rank what came of it; all of them must call it.

    Raises:
        UsageError, RunError: as on rank 0, so that none waits for one that failed. Any other exception of rank 0 is a
            RunError everywhere, and in the log of rank 0 with its stack.
    """
    box: list[tuple[Any, str | None, bool]] = [(None, None, False)]
    if dist.get_rank() == 0:
        try:
            box[0] = (action(), None, False)
        except Exception as error:  # whatever it is, the other ranks wait for word of it
            if not isinstance(error, (UsageError, RunError)):
                logger.exception("rank 0 failed while the others wait for it")
            box[0] = (None, str(error) or type(error).__name__, isinstance(error, UsageError))
    dist.broadcast_object_list(box, src=0)
    value, failure, misuse = box[0]
    if failure is not None:
        raise (UsageError if misuse else RunError)(failure)
    return value  # type: ignore[no-any-return]


def gathered(value: V) -> list[V]:
    """Every rank's ``value`` on rank 0, in the order of the ranks, and an empty list elsewhere; all must call it."""
    box: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, box, dst=0)
    return box or []


def from_every_rank(value: V, topology: Topology) -> list[V]:
    """Every rank's ``value``, in the order of the ranks, on all of them; all must call it."""
    everything: list[Any] = [None] * topology.layout.world_size
    dist.all_gather_object(everything, value)
    return everything


def largest(values: list[int], topology: Topology) -> list[int]:
    """The largest of each number over all ranks; all of them must call it."""
    tensor = torch.tensor(values, device=topology.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    told: list[int] = tensor.tolist()
    return told


def together(work: Callable[[], V], topology: Topology) -> V:
    """This rank's result of ``work``, which may take long, when every rank has its own; all of them must call it.

    The ranks ask each other again and again instead of waiting in one collective, which would end with a time-out where
    one file system is slow. ``work`` runs in a thread and communicates with nobody.
    """
    outcome: list[V] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="together")
    thread.start()
    pause = _FIRST_LOOK_S
    while largest([thread.is_alive()], topology)[0]:
        time.sleep(pause)
        pause = min(2 * pause, _SLOWEST_LOOK_S)
    if failure:
        raise failure[0]
    return outcome[0]


def wait_for_all() -> None:
    """Return when every rank has called this."""
    dist.barrier()
