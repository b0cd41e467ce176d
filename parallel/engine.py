"""One training step on Megatron-Core: schedule, gradient reduction, distributed optimizer, learning rate."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from ..configs.ramps import StepShape, full_shape
from ..configs.schema import Config
from ..configs.stack import expand
from .engine_config import DTYPES
from .fp8_control import Fp8Control
from .microbatch import Microbatches
from .optimizer_state import OwningOptimizer, mended_optimizer
from .pipeline import KVCarryCommunicator
from .random_states import RandomStates
from .topology import Topology, from_last_stage, sum_over_data


@dataclass(frozen=True)
class StepResult:
    """What one step gave, equal on every rank."""

    loss: float
    grad_norm: float
    learning_rate: float
    """The rate that this step used."""


class Engine:
    """The model chunks of this rank with everything that trains them.

    Args:
        chunks: this rank's pipeline chunks, uninitialised or initialised, in fp32 on the rank's device.
        config: the run.
    """

    def __init__(self, chunks: list[Any], config: Config, topology: Topology) -> None:
        self.config, self.topology = config, topology
        self.engine_config = chunks[0].config
        self.chunks = chunks
        self.fp8 = Fp8Control(chunks, config, topology)
        _cast(chunks, DTYPES[config.precision.compute])
        self.parallel_chunks = _wrap(chunks, topology)
        with mended_optimizer():
            self.optimizer = get_megatron_optimizer(_optimizer_config(config), self.parallel_chunks)
        self.scheduler = _scheduler(config, self.optimizer)
        self.engine_config.grad_scale_func = self.optimizer.scale_loss
        self.engine_config.finalize_model_grads_func = self._finalize_gradients
        self._communicator_in_use: KVCarryCommunicator | None = None
        self._started = 0.0
        self.measures_work = False
        """Whether the next step notes ``own_work_s``, which on a GPU costs a synchronisation."""
        self.own_work_s = 0.0
        """Seconds of the last measured step that this rank spent on its own work: until its gradients were there,
        without waiting for other pipeline stages. Waits inside tensor and context groups count as work, so that such
        a group is slow together."""

    def train_step(self, microbatches: Microbatches, shape: StepShape | None = None) -> StepResult:
        """Run a step's microbatches forward and backward and update the parameters, whatever comes of it.

        ``shape`` is what the step takes where that is not the full batch, for as long as something ramps up.
        """
        loss = self.compute_gradients(microbatches, shape)
        grad_norm = self.gradient_norm()
        return StepResult(loss, grad_norm, self.update(grad_norm))

    def gradient_norm(self) -> float:
        """Norm of the reduced gradients of the whole model, before they are clipped; the same on every rank."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def update(self, grad_norm: float) -> float:
        """Clip the gradients, whose norm is given, and change the parameters; returns the learning rate used."""
        learning_rate = self._learning_rate
        if self.config.optimizer.clip_grad > 0:
            for optimizer in self.optimizers():
                clip_grad_by_total_norm_fp32(
                    optimizer.get_parameters(), self.config.optimizer.clip_grad, grad_norm, use_decoupled_grad=False
                )
        self.optimizer.step_with_ready_grads()
        self.fp8.end_step()
        self.scheduler.step(increment=1)
        return learning_rate

    def skip_update(self) -> float:
        """Change no parameter, while the schedule goes on; returns the learning rate that was not used."""
        learning_rate = self._learning_rate
        self.scheduler.step(increment=1)
        return learning_rate

    @property
    def _learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def optimizers(self) -> list[OwningOptimizer]:
        """Megatron-Core chains one optimizer for each group of ranks over which gradients are reduced."""
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))

    def restore_schedule(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint's schedule stood, under the rates and betas of *this* configuration.

        Megatron-Core's optimizer takes its groups' settings from the checkpoint, which would silently win over a
        changed configuration.
        """
        o = self.config.optimizer
        for group in self.optimizer.param_groups:
            group.update(max_lr=o.learning_rate, min_lr=o.minimum_learning_rate, betas=o.betas, eps=o.eps)
        # Megatron-Core's schedule takes the steps of a checkpoint in addition to those that it has taken.
        self.scheduler.num_steps = 0
        self.scheduler.load_state_dict(state)

    def random_states(self) -> RandomStates:
        """This rank's random generators as they are now."""
        return RandomStates.now(self.topology.device)

    def close(self) -> None:
        """Let go of the process groups, so that leaving the topology can end their threads.

        A parameter's gradient hook holds the wrapper that made it, whose configuration holds the optimizer and this
        engine, whose views of the parameter hold the hook: a cycle through C++, where no collector sees it.
        """
        self.engine_config.grad_scale_func = self.engine_config.finalize_model_grads_func = None
        self._communicator_in_use = None  # its copy of the configuration has them, too
        for chunk in self.parallel_chunks:
            chunk.grad_accs.clear()

    def compute_gradients(self, microbatches: Microbatches, shape: StepShape | None = None) -> float:
        """Forward and backward alone: leaves the reduced gradients in each parameter's ``main_grad``."""
        self._started = time.perf_counter()
        for chunk in self.parallel_chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        shape = shape or full_shape(self.config.train)
        num_microbatches = self.num_microbatches(shape.samples)
        self.fp8.begin_step(shape.tokens)
        return self._run(microbatches, num_microbatches, shape, forward_only=False)

    @torch.no_grad()
    def evaluate(self, microbatches: Microbatches, num_microbatches: int) -> float:
        """Mean loss over ``num_microbatches`` of full length per data-parallel rank, without gradients."""
        for chunk in self.parallel_chunks:
            chunk.eval()
        return self._run(microbatches, num_microbatches, full_shape(self.config.train), forward_only=True)

    @torch.no_grad()
    def loss_without_fp8(self, microbatches: Microbatches, shape: StepShape) -> float:
        """Loss of a step's microbatches as the compute type gives it, with the parameters as they are."""
        with self.fp8.off():
            return self._run(microbatches, self.num_microbatches(shape.samples), shape, forward_only=True)

    def num_microbatches(self, samples: int) -> int:
        """Microbatches of each data-parallel rank in a step of ``samples``."""
        return samples // (self.config.train.micro_batch_size * self.topology.layout.data)

    def _run(self, microbatches: Microbatches, num_microbatches: int, shape: StepShape, *, forward_only: bool) -> float:
        layout = self.topology.layout
        self.fp8.begin_pass()
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


def _cast(chunks: list[Any], dtype: torch.dtype) -> None:
    """Give matrices the compute type. Vectors (norms, lambda) stay in fp32: they are small, and lambda is in an exp.

    Either all vectors or none: they are one group of the optimizer, and Megatron-Core 0.16.1 mistakes a group's
    parameters for each other in checkpoints when the group mixes types.
    """
    for parameter in itertools.chain.from_iterable(chunk.parameters() for chunk in chunks):
        if parameter.dim() > 1:
            parameter.data = parameter.data.to(dtype)


def _wrap(chunks: list[Any], topology: Topology) -> list[Any]:
    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    wrap = functools.partial(DistributedDataParallel, config=chunks[0].config, ddp_config=options)
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


def _scheduler(config: Config, optimizer: Any) -> OptimizerParamScheduler:
    """Megatron-Core's schedule, counted in steps: as its settings are, whatever the batch size."""
    o = config.optimizer
    decay = o.decay_steps or config.train.steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.learning_rate,
        min_lr=o.minimum_learning_rate,
        lr_warmup_steps=o.warmup_steps,
        lr_decay_steps=decay,
        lr_decay_style="WSD" if o.schedule == "wsd" else o.schedule,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=o.wsd_decay(decay),
        lr_wsd_decay_style="linear",
    )
