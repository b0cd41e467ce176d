"""Megatron-Core's distributed optimizer with its state told, saved and loaded right.

Each rank owns a range of the elements of some parameters. Megatron-Core 0.16.1 saves that either bound to the layout
(``dp_reshardable``) or by gathering all of it on every rank (``fully_reshardable``), which takes the memory of the
whole state and a pause of the training. Here each rank describes what it owns as pieces of global tensors
(``shards.py``): nothing is gathered, all ranks write, and every layout can read. (Its ``fully_reshardable`` also cuts
parameters at offsets with padding out of buffers without, once there are several buckets.)

Beside these pieces a checkpoint needs the number of updates alone. The fused Adams of Transformer Engine and apex keep
it per group and torch's per parameter, which Megatron-Core's own loading mistakes: it gives all parameters the *same*
step tensor, so that every step counts as many as there are parameters and the bias correction is silently wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import megatron.core.optimizer as engine_optimizer
import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from .engine import STATE_KEYS, Owned


class OwningOptimizer(distrib_optimizer.DistributedOptimizer):  # type: ignore[misc]
    """Tells what it owns, and how often it has updated it."""

    def owned(self) -> Iterator[Owned]:
        """Every part of a parameter that this rank owns, also before the first update has made its state."""
        self._fill_state()
        for buffer in self.gbuf_ranges:
            for buckets in buffer.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        tensors = self._get_main_param_and_optimizer_states(parameter)
                        state = {key: tensors[key].detach() for key in STATE_KEYS}
                        yield Owned(parameter, ranges["param"].start, state)

    @property
    def updates(self) -> int:
        """Updates done, by which Adam corrects its moments: of a rank that owns anything, those of the run."""
        return int(self.optimizer.param_groups[0].get("step", 0))

    @updates.setter
    def updates(self, count: int) -> None:
        for group in self.optimizer.param_groups:
            group["step"] = count

    def clip(self, max_norm: float, norm: float) -> None:
        """Scale the gradients, by the end of the next update at the latest, to ``max_norm`` if their norm is larger."""
        clip_grad_by_total_norm_fp32(self.get_parameters(), max_norm, norm, use_decoupled_grad=False)

    def _fill_state(self) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    self.optimizer.state[parameter] |= self._first_state(parameter)

    def _first_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


class TorchAdamOptimizer(OwningOptimizer):
    """Keeps a step count per parameter.

    Updates in one pass (torch's fused AdamW), which the factory does not ask for: on a CPU the default makes ten. The
    same pass clips.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for group in self.optimizer.param_groups:
            group.update(fused=True, foreach=False)

    def clip(self, max_norm: float, norm: float) -> None:
        """As ``OwningOptimizer.clip``, in the next update."""
        excess = (norm + 1e-6) / max_norm
        # Torch's fused update divides the gradients by this.
        self.optimizer.grad_scale = torch.tensor(excess) if excess > 1 else None

    @property
    def updates(self) -> int:
        """As the base class says."""
        return next((int(state["step"]) for state in self.optimizer.state.values()), 0)

    @updates.setter
    def updates(self, count: int) -> None:
        self._fill_state()
        for state in self.optimizer.state.values():
            state["step"].fill_(count)

    def _first_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"step": torch.zeros((), device=parameter.device), **super()._first_state(parameter)}


@contextmanager
def mended_optimizer() -> Iterator[None]:
    """Within it, Megatron-Core's factory builds the subclass that fits this machine's Adam."""
    original = engine_optimizer.DistributedOptimizer
    fused = distrib_optimizer.HAVE_APEX_OR_TE
    engine_optimizer.DistributedOptimizer = OwningOptimizer if fused else TorchAdamOptimizer
    try:
        yield
    finally:
        engine_optimizer.DistributedOptimizer = original
