"""One training step, whichever library divides the optimizer: what a run, a checkpoint and parity ask of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from ..configs.ramps import StepShape, full_shape
from ..configs.schema import Config
from .engine_config import DTYPES
from .fp8_control import Fp8Control
from .microbatch import Microbatches
from .random_states import RandomStates
from .topology import Topology


@dataclass(frozen=True)
class StepResult:
    """What one step gave, equal on every rank."""

    loss: float
    grad_norm: float
    learning_rate: float
    """The rate that this step used."""


@dataclass(frozen=True)
class Owned:
    """The part of a parameter whose reduced gradient and optimizer state this rank keeps."""

    parameter: nn.Parameter
    start: int
    """The first element, of the parameter as it lies flat in this tensor rank's memory."""
    state: dict[str, Tensor]
    """By ``STATE_KEYS``: flat, fp32, the live memory."""
    copy: int = 0
    """Which of the equal copies that ranks keep of it."""

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.state["param"].numel()


STATE_KEYS = ("param", "exp_avg", "exp_avg_sq")
"""The fp32 master copy of a parameter, and Adam's moments."""


class Engine(ABC):
    """The model chunks of this rank with everything that trains them.

    Args:
        chunks: this rank's pipeline chunks, in fp32 on the rank's device; the engine gives them the compute type.
        config: the run.
    """

    divides_parameters = False
    """Whether a rank holds only a part of its parameters between steps, the one that it owns."""

    def __init__(
        self, chunks: list[Any], config: Config, topology: Topology, vectors: torch.dtype = torch.float32
    ) -> None:
        """``vectors`` is the type of parameters of one dimension."""
        self.config, self.topology = config, topology
        self.engine_config = chunks[0].config
        self.chunks = chunks
        self.fp8 = Fp8Control(chunks, config, topology)
        _cast(chunks, DTYPES[config.precision.compute], vectors)
        self.scheduler: OptimizerParamScheduler
        self.measures_work = False
        """Whether the next step notes ``own_work_s``, which on a GPU costs a synchronisation."""
        self.own_work_s = 0.0
        """Seconds of the last measured step that this rank spent on its own work, without waiting for other stages or
        data ranks. Waits inside tensor and context groups count as work, so that such a group is slow together."""

    def train_step(self, microbatches: Microbatches, shape: StepShape | None = None) -> StepResult:
        """Run a step's microbatches forward and backward and update the parameters, whatever comes of it.

        ``shape`` is what the step takes where that is not the full batch, for as long as something ramps up.
        """
        loss = self.compute_gradients(microbatches, shape)
        grad_norm = self.gradient_norm()
        return StepResult(loss, grad_norm, self.update(grad_norm))

    def compute_gradients(self, microbatches: Microbatches, shape: StepShape | None = None) -> float:
        """Forward and backward alone: leaves the reduced gradients, which a second call throws away; the loss."""
        shape = shape or full_shape(self.config.train)
        num_microbatches = self.num_microbatches(shape.samples)
        for chunk in self.chunks:
            chunk.train()
        self._drop_gradients()
        self.fp8.begin_step(shape.tokens)
        self.fp8.begin_pass()
        return self._run(microbatches, num_microbatches, shape, forward_only=False)

    @abstractmethod
    def gradient_norm(self) -> float:
        """Norm of the reduced gradients of the whole model, before they are clipped; the same on every rank."""

    def update(self, grad_norm: float) -> float:
        """Clip the gradients, whose norm is given, and change the parameters; returns the learning rate used."""
        learning_rate = self.learning_rate
        self._update(grad_norm)
        self.fp8.end_step()
        self.scheduler.step(increment=1)
        return learning_rate

    def skip_update(self) -> float:
        """Change no parameter, while the schedule goes on; returns the learning rate that was not used."""
        learning_rate = self.learning_rate
        self.scheduler.step(increment=1)
        return learning_rate

    @torch.no_grad()
    def evaluate(self, microbatches: Microbatches, num_microbatches: int) -> float:
        """Mean loss over ``num_microbatches`` of full length per data-parallel rank, without gradients."""
        for chunk in self.chunks:
            chunk.eval()
        self.fp8.begin_pass()
        return self._run(microbatches, num_microbatches, full_shape(self.config.train), forward_only=True)

    @torch.no_grad()
    def loss_without_fp8(self, microbatches: Microbatches, shape: StepShape) -> float:
        """Loss of a step's microbatches as the compute type gives it, with the parameters as they are."""
        self.fp8.begin_pass()
        with self.fp8.off():
            return self._run(microbatches, self.num_microbatches(shape.samples), shape, forward_only=True)

    def num_microbatches(self, samples: int) -> int:
        """Microbatches of each data-parallel rank in a step of ``samples``."""
        return samples // (self.config.train.micro_batch_size * self.topology.layout.data)

    @abstractmethod
    def owned(self) -> Iterator[Owned]:
        """Every part of a parameter that this rank owns, also before the first update has made its state."""

    @abstractmethod
    def weight_of(self, owned: Owned) -> Tensor:
        """The elements of ``owned`` as the model computes with them: flat, the live memory."""

    @abstractmethod
    def gradient_of(self, owned: Owned) -> Tensor:
        """The reduced gradient of ``owned``, flat, after ``compute_gradients``."""

    @abstractmethod
    def take_loaded(self, weights: dict[nn.Parameter, Tensor]) -> None:
        """Compute with what a checkpoint gave: the states of ``owned`` have been read, and ``weights``, none of them
        where ranks do not hold parameters whole. Every rank must call it."""

    def whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
        """Within it ``parameters`` can be read where ranks hold parts of them. Every rank must enter it."""
        return nullcontext()

    updates: int
    """How often Adam has changed the parameters, which its bias correction counts; settable."""

    def restore_schedule(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint's schedule stood, under the rates and betas of *this* configuration."""
        # Megatron-Core's schedule takes the steps of a checkpoint in addition to those that it has taken.
        self.scheduler.num_steps = 0
        self.scheduler.load_state_dict(state)

    def random_states(self) -> RandomStates:
        """This rank's random generators as they are now."""
        return RandomStates.now(self.topology.device)

    @abstractmethod
    def close(self) -> None:
        """Let go of the process groups, so that leaving the topology can end their threads."""

    @abstractmethod
    def _drop_gradients(self) -> None:
        """Forget the gradients of the last step, if they are still there."""

    @abstractmethod
    def _run(self, microbatches: Microbatches, num_microbatches: int, shape: StepShape, *, forward_only: bool) -> float:
        """Take the microbatches through the model, and back for the gradients; their mean loss over all ranks."""

    @abstractmethod
    def _update(self, grad_norm: float) -> None:
        """Clip the gradients, whose norm is given, and change the parameters."""

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self.scheduler.optimizer.param_groups[0]["lr"])


def _cast(chunks: list[Any], matrices: torch.dtype, vectors: torch.dtype) -> None:
    """Give matrices the compute type. Vectors (norms, lambda) are best in fp32: small, and lambda is in an exp."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.data.to(matrices if parameter.dim() > 1 else vectors)


def make_schedule(config: Config, optimizer: Any) -> OptimizerParamScheduler:
    """Megatron-Core's schedule, counted in steps: as its settings are, whatever the batch size.

    ``optimizer`` has ``param_groups``, whose rates and weight decay it sets.
    """
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
