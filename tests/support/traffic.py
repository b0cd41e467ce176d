"""A job for the rank pool: the collectives of one forward and backward pass."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trine.configs.checks import check_layout
from trine.configs.schema import Config
from trine.models.build import build_chunks
from trine.parallel.topology import build_topology, leave_topology, local_device


class Traffic(TorchDispatchMode):
    """Counts the collectives of torch.distributed that run while it is in force."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().split("::")
        if namespace == "c10d":
            self.counts[name.partition(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))


def collectives(rank: int, world_size: int, *, config: dict[str, Any]) -> dict[str, int]:
    """How often each collective runs in one forward and backward pass of the model, by its name in the dispatcher."""
    run = Config.model_validate(config)
    topology = build_topology(check_layout(run, world_size), local_device(rank))
    (model,) = build_chunks(run, topology)
    tokens = torch.randint(0, 200, (1, run.train.sequence_length), generator=torch.Generator().manual_seed(0))
    with Traffic() as traffic:
        model(tokens, tokens).backward()
    leave_topology()
    return dict(traffic.counts)
