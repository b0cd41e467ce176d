"""Jobs for the rank pool: the memory of a training step."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker

from trine.configs.checks import check_layout
from trine.configs.schema import Config
from trine.models.build import build_chunks, local_parameters
from trine.parallel.microbatch import Microbatch
from trine.parallel.topology import build_topology, leave_topology, local_device
from trine.pretrain.parity import batch_of_step, joined_engine


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


def held_within_a_step(rank: int, world_size: int, *, config: dict[str, Any], steps: int) -> float:
    """Bytes per element of the model in this rank's tensors between two microbatches of a step, after some steps."""
    before, held = _bytes_of_tensors(), []

    def noting(microbatches: Iterator[Microbatch]) -> Iterator[Microbatch]:
        for number, microbatch in enumerate(microbatches):
            if number == 1:
                held.append(_bytes_of_tensors() - before)
            yield microbatch

    with joined_engine(rank, world_size, Config.model_validate(config)) as engine:
        for step in range(steps):
            engine.train_step(noting(batch_of_step(engine, step)))
        return held[-1] / local_parameters(engine.chunks)


def _bytes_of_tensors() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of objects that dislike being asked
        tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    # A gradient that no line of Python has asked for is no object of Python.
    tensors += [one.grad for one in tensors if one.is_leaf and one.grad is not None]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())
