"""A job for the rank pool: the memory of a training step's activations."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker

from trine.configs.checks import check_layout
from trine.configs.schema import Config
from trine.models.build import build_chunks
from trine.parallel.topology import build_topology, leave_topology, local_device


def kept_activations(rank: int, world_size: int, *, config: dict[str, Any]) -> int:
    """Bytes, beside parameters and their gradients, that this rank keeps between the forward and the backward pass."""
    run = Config.model_validate(config)
    topology = build_topology(check_layout(run, world_size), local_device(rank))
    (model,) = build_chunks(run, topology)
    tokens = torch.randint(0, 200, (1, run.train.sequence_length), generator=torch.Generator().manual_seed(0))
    model(tokens, tokens).backward()
    with MemTracker() as tracker:
        loss = model(tokens, tokens)
        (sizes,) = tracker.get_tracker_snapshot("current").values()
        loss.backward()
    leave_topology()
    return sum(size for kind, size in sizes.items() if getattr(kind, "name", "PARAM") not in ("PARAM", "GRAD"))
