"""The engine on DeepSpeed: ZeRO around the same tensor-parallel blocks, without pipeline stages.

DeepSpeed reduces gradients while they are computed, clips and updates. What it does not know of Megatron-Core's models
is added here: the sums over tensor ranks of what sequence parallelism leaves partial, the gradient norm before the
update, the schedule.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..configs.errors import RunError
from ..configs.ramps import StepShape
from ..configs.schema import Config
from .deepspeed_partitions import partitions_of
from .deepspeed_start import load_deepspeed, start, stop
from .engine import Engine, Owned, make_schedule
from .engine_config import DTYPES
from .microbatch import Microbatches
from .parameters import blueprint_of
from .topology import Topology, sum_over_data


class DeepSpeedEngine(Engine):
    """Tensor, sequence, context and data parallelism; what data and context ranks divide is ZeRO's stage."""

    def __init__(self, chunks: list[Any], config: Config, topology: Topology) -> None:
        # Stage 3 has one type for all parameters.
        one_type = config.zero_stage == 3
        super().__init__(chunks, config, topology, DTYPES[config.precision.compute] if one_type else torch.float32)
        (model,) = chunks
        self._hooks = [hook for p in model.parameters() if (hook := _sum_over_tensor_ranks(p, topology))]
        optimizer = _adamw(model, config)
        # The groups themselves outlive what DeepSpeed makes of the parameters in them.
        self.deepspeed = start(model, optimizer, config, topology)
        self.scheduler = make_schedule(config, optimizer)
        self._partitions = partitions_of(self.deepspeed)
        self.divides_parameters = self._partitions.divides_parameters

    def gradient_norm(self) -> float:
        """As the base class says."""
        tensor_rank = self.topology.tensor_rank
        own = (
            owned
            for owned in self.owned()
            if owned.copy == 0 and (tensor_rank == 0 or blueprint_of(owned.parameter).partition is not None)
        )
        squares = [torch.linalg.vector_norm(self.gradient_of(one), dtype=torch.float64).square() for one in own]
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
        total = sum_over_data(total.to(self.topology.device), self.topology)
        dist.all_reduce(total, group=self.topology.groups.tp)
        return float(total.sqrt())

    def owned(self) -> Iterator[Owned]:
        """As the base class says."""
        return self._partitions.owned()

    def weight_of(self, owned: Owned) -> Tensor:
        """As the base class says."""
        return self._partitions.weight_of(owned)

    def gradient_of(self, owned: Owned) -> Tensor:
        """As the base class says."""
        return self._partitions.gradient_of(owned)

    def take_loaded(self, weights: dict[nn.Parameter, Tensor]) -> None:
        """As the base class says: the parameters are what their master copies are in the compute type."""
        self._partitions.take_masters()

    @property
    def updates(self) -> int:
        """As the base class says."""
        return self._partitions.updates

    @updates.setter
    def updates(self, count: int) -> None:
        self._partitions.updates = count

    def whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
        """As the base class says."""
        gathered: AbstractContextManager[None] = load_deepspeed().zero.GatheredParameters(parameters)
        return gathered

    def close(self) -> None:
        """As the base class says."""
        for hook in self._hooks:
            hook.remove()
        stop(self.deepspeed)

    def _drop_gradients(self) -> None:
        self._partitions.drop_gradients()

    def _run(self, microbatches: Microbatches, num_microbatches: int, shape: StepShape, *, forward_only: bool) -> float:
        losses = []
        self.own_work_s = 0.0
        for number in range(num_microbatches):
            if not forward_only:
                self.deepspeed.set_gradient_accumulation_boundary(number == num_microbatches - 1)
            started = time.perf_counter()
            loss = self.deepspeed(*next(microbatches))
            self._note_work(started)
            losses.append(loss.detach().double())
            if not forward_only:
                self.deepspeed.backward(loss / num_microbatches, scale_wrt_gas=False)
        total = torch.stack(losses).sum()
        loss, count = sum_over_data(torch.stack([total, total.new_tensor(float(num_microbatches))]), self.topology)
        return float(loss / count)

    def _note_work(self, started: float) -> None:
        """Count a forward pass alone: a backward pass waits for other ranks' gradients."""
        if self.measures_work:
            if self.topology.device.type == "cuda":
                torch.cuda.synchronize()
            self.own_work_s += time.perf_counter() - started

    def _update(self, grad_norm: float) -> None:
        self.deepspeed.step()
        if not self.deepspeed.was_step_applied():
            raise RunError(
                f"DeepSpeed did not update the parameters: the gradient norm, {grad_norm:g}, is not finite by its own "
                "sum in fp32; lower optimizer.learning_rate or optimizer.clip_grad"
            )


def _adamw(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW as Megatron-Core groups it: matrices decay, vectors do not."""
    o = config.optimizer
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "wd_mult": 1.0}, {"params": vectors, "wd_mult": 0.0}]
    rates = {"lr_mult": 1.0, "max_lr": o.learning_rate, "min_lr": o.minimum_learning_rate}
    return torch.optim.AdamW(
        [group | rates for group in groups], lr=o.learning_rate, betas=o.betas, eps=o.eps, fused=True
    )


def _sum_over_tensor_ranks(parameter: nn.Parameter, topology: Topology) -> Any:
    """A hook on the gradient of a parameter of which each tensor rank sees its share of the tokens; else None."""
    if not getattr(parameter, "sequence_parallel", False):
        return None

    def add_up(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=topology.groups.tp)
        return gradient

    return parameter.register_hook(add_up)  # type: ignore[no-untyped-call]
