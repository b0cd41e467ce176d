"""The engine on Megatron-Core alone: its schedules, its gradient reduction, its distributed optimizer."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from ..configs.ramps import StepShape
from ..configs.schema import Config
from ..configs.stack import expand
from .data_parallel import DataParallel
from .engine import Engine, Owned, make_schedule
from .engine_config import DTYPES
from .microbatch import Microbatches
from .optimizer_state import OwningOptimizer, mended_optimizer
from .pipeline import KVCarryCommunicator
from .topology import Topology, from_last_stage, sum_over_data


class MegatronEngine(Engine):
    """Every layout; the state of the optimizer is divided over data and context ranks."""

    def __init__(self, chunks: list[Any], config: Config, topology: Topology) -> None:
        super().__init__(chunks, config, topology)
        self.parallel_chunks = _wrap(chunks, topology)
        with mended_optimizer():
            self.optimizer = get_megatron_optimizer(_optimizer_config(config), self.parallel_chunks)
        self.scheduler = make_schedule(config, self.optimizer)
        self.engine_config.grad_scale_func = self.optimizer.scale_loss
        self.engine_config.finalize_model_grads_func = self._finalize_gradients
        self._communicator_in_use: KVCarryCommunicator | None = None
        self._started = 0.0

    def gradient_norm(self) -> float:
        """As the base class says."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def owned(self) -> Iterator[Owned]:
        """As the base class says."""
        for optimizer in self._optimizers():
            yield from optimizer.owned()

    def weight_of(self, owned: Owned) -> Tensor:
        """As the base class says."""
        return owned.parameter.detach().view(-1)[owned.start : owned.stop]

    def gradient_of(self, owned: Owned) -> Tensor:
        """As the base class says."""
        gradient: Tensor = owned.parameter.main_grad  # type: ignore[attr-defined]
        return gradient.view(-1)[owned.start : owned.stop]

    @torch.no_grad()
    def take_loaded(self, weights: dict[nn.Parameter, Tensor]) -> None:
        """As the base class says."""
        for parameter, weight in weights.items():
            parameter.copy_(weight)

    @property
    def updates(self) -> int:
        """As the base class says."""
        return self._optimizers()[0].updates

    @updates.setter
    def updates(self, count: int) -> None:
        for optimizer in self._optimizers():
            optimizer.updates = count

    def close(self) -> None:
        """As the base class says.

        A parameter's gradient hook holds the wrapper that made it, whose configuration holds the optimizer and this
        engine, whose views of the parameter hold the hook: a cycle through C++, where no collector sees it.
        """
        self.engine_config.grad_scale_func = self.engine_config.finalize_model_grads_func = None
        self._communicator_in_use = None  # its copy of the configuration has them, too
        for chunk in self.parallel_chunks:
            chunk.grad_accs.clear()

    def _optimizers(self) -> list[OwningOptimizer]:
        """Megatron-Core chains one optimizer for each group of ranks over which gradients are reduced."""
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))

    def _drop_gradients(self) -> None:
        self._started = time.perf_counter()
        for chunk in self.parallel_chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _update(self, grad_norm: float) -> None:
        if self.config.optimizer.clip_grad > 0:
            for optimizer in self._optimizers():
                optimizer.clip(self.config.optimizer.clip_grad, grad_norm)
        self.optimizer.step_with_ready_grads()

    def _run(self, microbatches: Microbatches, num_microbatches: int, shape: StepShape, *, forward_only: bool) -> float:
        layout = self.topology.layout
        iterators = list(itertools.tee(microbatches, len(self.parallel_chunks)))
        arguments: dict[str, Any] = dict(
            forward_step_func=self._forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.parallel_chunks if len(iterators) > 1 else self.parallel_chunks[0],
            num_microbatches=num_microbatches,
            seq_length=shape.sequence_length,
            micro_batch_size=self.config.train.micro_batch_size * shape.pieces,
            forward_only=forward_only,
        )
        communicator = self._communicator_in_use = None
        if layout.pipeline > 1:
            communicator = self._communicator_in_use = self._communicator(num_microbatches, shape, forward_only)
            communicator.measures_waits = self.measures_work
            arguments |= dict(p2p_communicator=communicator, pg_collection=self.topology.groups)
        reports = get_forward_backward_func()(**arguments)
        if communicator is not None:
            communicator.check_finished()
        return self._mean_loss(reports)

    def _finalize_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Megatron-Core's callback between the last backward pass and the update: the ranks wait for each other."""
        if self.measures_work:
            if self.topology.device.type == "cuda":
                torch.cuda.synchronize()
            waited = self._communicator_in_use.waited_s if self._communicator_in_use else 0.0
            self.own_work_s = time.perf_counter() - self._started - waited
        finalize_model_grads(*args, **kwargs)

    def _forward_step(
        self, microbatches: Microbatches, model: nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]:
        """Megatron-Core's callback for one microbatch on one stage."""
        return model(*next(microbatches)), self._loss

    def _loss(self, mean: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's part of the microbatch's mean loss, and the mean over its own tokens, given, as a report.

        Gradients are averaged over data and context ranks, and the schedule multiplies by the context size to make
        a sum over context ranks of it: so each part is divided by the tokens of the whole sequences.
        """
        return mean / self.topology.layout.context, {"loss": mean.detach()}

    def _communicator(self, num_microbatches: int, shape: StepShape, forward_only: bool) -> KVCarryCommunicator:
        engine = self.engine_config
        rows = shape.sequence_length // engine.context_parallel_size
        return KVCarryCommunicator(
            expand(self.config.model.stack), engine, self.topology.groups,
            split=self.chunks[0].split,
            rows=rows // engine.tensor_model_parallel_size if engine.sequence_parallel else rows,
            micro_batch_size=self.config.train.micro_batch_size * shape.pieces,
            num_microbatches=num_microbatches,
            forward_only=forward_only,
        )  # fmt: skip

    def _mean_loss(self, reports: list[dict[str, Tensor]]) -> float:
        """Average over microbatches and data-parallel ranks, told to every pipeline stage."""
        loss = torch.zeros(2, dtype=torch.float64, device=self.topology.device)
        if self.topology.is_last_stage:
            losses = torch.stack([report["loss"] for report in reports]).double()
            loss = sum_over_data(torch.stack([losses.sum(), losses.new_tensor(float(len(reports)))]), self.topology)
        total, count = from_last_stage(loss, self.topology)
        return float(total / count)


def _wrap(chunks: list[Any], topology: Topology) -> list[Any]:
    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    wrap = functools.partial(DataParallel, config=chunks[0].config, ddp_config=options)
    return [wrap(module=chunk, disable_bucketing=number > 0) for number, chunk in enumerate(chunks)]


def _optimizer_config(config: Config) -> OptimizerConfig:
    o = config.optimizer
    return OptimizerConfig(
        optimizer="adam",
        lr=o.learning_rate,
        min_lr=o.minimum_learning_rate,
        weight_decay=o.weight_decay,
        adam_beta1=o.betas[0],
        adam_beta2=o.betas[1],
        adam_eps=o.eps,
        clip_grad=o.clip_grad,
        params_dtype=DTYPES[config.precision.compute],
        bf16=config.precision.compute == "bf16",
        use_distributed_optimizer=True,
    )
