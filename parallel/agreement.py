"""What some ranks found, told to all of them."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .topology import Topology

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
    everything: list[Any] = [None] * topology.layout.world_size
    dist.all_gather_object(everything, found)
    merged: dict[K, V] = {}
    for one in everything:
        for key, value in one.items():
            merged.setdefault(key, value)
    return merged


def from_first_rank(value: V, topology: Topology) -> V:
    """What rank 0 calls ``value``, on every rank; all of them must call it."""
    box = [value if topology.rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    told: Any = box[0]
    return told  # type: ignore[no-any-return]
