"""Process groups: which part of the model and of the data this rank holds, and how it reaches the others."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from ..configs.checks import Layout

TIMEOUT_S = 600.0
"""How long a rank waits for others in a collective, unless told otherwise."""


@dataclass(frozen=True)
class Topology:
    """This rank's place in the layout."""

    layout: Layout
    groups: ProcessGroupCollection
    rank: int
    device: torch.device

    @property
    def tensor_rank(self) -> int:
        """Rank among those that share each layer's matrices."""
        return int(self.groups.tp.rank())

    @property
    def pipeline_rank(self) -> int:
        """Pipeline stage, from 0."""
        return int(self.groups.pp.rank())

    @property
    def data_rank(self) -> int:
        """Rank among those that hold the same parameters and read different samples."""
        return int(self.groups.dp.rank())

    @property
    def is_first_of_replica(self) -> bool:
        """Whether this is the first of the ranks that together hold one copy of the model and read the same samples."""
        return self.tensor_rank == self.pipeline_rank == int(self.groups.cp.rank()) == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pipeline_rank == self.layout.pipeline - 1


def local_device(local_rank: int) -> torch.device:
    """The device of a process: its own GPU where there are any, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def join(
    rank: int, world_size: int, local_rank: int, init_method: str = "env://", timeout: float = TIMEOUT_S
) -> torch.device:
    """Join the run's process group (NCCL on GPUs, gloo on CPUs) and return this process's device.

    ``timeout`` is the number of seconds after which a collective that others do not join fails.
    """
    device = local_device(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=rank, world_size=world_size, init_method=init_method, timeout=datetime.timedelta(seconds=timeout),
        )  # fmt: skip
    return device


def build_topology(layout: Layout, device: torch.device, timeout: float = TIMEOUT_S) -> Topology:
    """Make Megatron-Core's process groups for ``layout``. The process group must have been joined."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        distributed_timeout_minutes=timeout / 60,  # made into a timedelta, for which fractions are fine
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Topology(layout, groups, dist.get_rank(), device)


def leave_topology() -> None:
    """Forget the groups of ``build_topology``, so that another layout can be built by the same processes."""
    parallel_state.destroy_model_parallel()


def leave() -> None:
    """Leave the run's process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_data(values: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Sum over the ranks that read different samples; every one of them must call it."""
    dist.all_reduce(values, group=topology.groups.dp_cp)
    return values


def from_last_stage(values: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Give every pipeline stage the values of the last one."""
    group = topology.groups.pp
    dist.broadcast(values, src=dist.get_global_rank(group, group.size() - 1), group=group)
    return values


def sum_over_pipeline(values: dict[int, float], length: int, topology: Topology) -> list[float]:
    """A list of ``length`` numbers summed over the pipeline stages, of which each gives some by index."""
    total = torch.zeros(length, dtype=torch.float64)
    for index, value in values.items():
        total[index] = value
    total = total.to(topology.device)
    dist.all_reduce(total, group=topology.groups.pp)
    out: list[float] = total.tolist()
    return out
