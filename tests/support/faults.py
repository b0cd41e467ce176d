"""Jobs for the rank pool that go wrong."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist

from trine.configs.errors import RunError, UsageError
from trine.parallel import regions
from trine.pretrain import parity


def train(rank: int, world_size: int, *, config: dict[str, Any], steps: int) -> parity.StepsOfRank:
    """Parity's job with two faults: tensor ranks do not sum the gradients of what their heads share, and the second
    of two pipeline stages is killed. Other layouts are as they should be."""
    if config["parallel"]["pipeline"] == 2 and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    summed = regions.copy_to_tensor_model_parallel_region
    if config["parallel"]["tensor"] == 2:
        regions.copy_to_tensor_model_parallel_region = lambda parameter, group: parameter
    try:
        return parity.train(rank, world_size, config=config, steps=steps)
    finally:
        regions.copy_to_tensor_model_parallel_region = summed


def broken(rank: int, world_size: int, *, config: dict[str, Any], steps: int) -> parity.StepsOfRank:
    """A mistake of the program that shows everywhere."""
    raise KeyError("absent")


def not_finite(rank: int, world_size: int, *, config: dict[str, Any], steps: int) -> parity.StepsOfRank:
    """What a model that overflows gives."""
    return {
        "losses": [float("inf")] * steps, "grad_norms": [float("nan")] * steps, "learning_rates": [1e-3] * steps,
        "evaluation": 1.0, "gradients": [], "parameters": [],
    }  # fmt: skip


def values(rank: int, world_size: int, *, factor: float) -> dict[str, Any]:
    """All kinds of values, and the sum over the ranks."""
    total = torch.tensor(factor * (rank + 1))
    dist.all_reduce(total)
    return {"total": total, "bf16": torch.ones(3, dtype=torch.bfloat16), "plain": [rank, "text", None, (1, 2.5)]}


def process_id(rank: int, world_size: int) -> int:
    """The worker's process."""
    return os.getpid()


def fail(rank: int, world_size: int, *, how: str) -> None:
    """The last rank fails while the others wait for it in an all-reduce."""
    if rank == world_size - 1:
        match how:
            case "usage":
                raise UsageError("train.steps=0 is too few: use more")
            case "run":
                raise RunError("the loss is not finite\nsecond line")
            case "mistake":
                raise KeyError("absent")
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "late":
                time.sleep(300)
    dist.all_reduce(torch.ones(1))
