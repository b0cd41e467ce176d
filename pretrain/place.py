"""The place of one process among those that train together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Place:
    """Which of the run's processes this one is, and who started it."""

    rank: int
    """From 0 to ``world_size`` - 1, unique in the run."""
    world_size: int
    local_rank: int
    """From 0 to ``local_world_size`` - 1, unique on its host; it chooses the GPU."""
    local_world_size: int
    source: Literal["local", "torchrun", "slurm", "mpi", "single"]
    """Who started it: ``local`` is trine's own launcher, ``single`` means nobody."""
