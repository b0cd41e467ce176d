"""Megatron-Core's distributed optimizer with its state told, saved and loaded right.

Each rank owns a range of the elements of some parameters. Megatron-Core 0.16.1 saves that either bound to the layout
(``dp_reshardable``) or by gathering all of it on every rank (``fully_reshardable``), which takes the memory of the
whole state and a pause of the training. Here each rank describes what it owns as pieces of global tensors
(``shards.py``): nothing is gathered, all ranks write, and every layout can read. (Its ``fully_reshardable`` also cuts
parameters at offsets with padding out of buffers without, once there are several buckets.)

Without Transformer Engine or apex the optimizer wraps torch's Adam, which keeps a step count per parameter where the
fused ones keep one per group. Megatron-Core then (1) cannot describe its state before the first step, nor on a rank
that owns no element of any parameter, and (2) gives all parameters the *same* step tensor on loading, so that every
step counts as many as there are parameters and the bias correction after a resume is silently wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import megatron.core.optimizer as engine_optimizer
import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor, nn

STATE_KEYS = ("param", "exp_avg", "exp_avg_sq")
"""The fp32 master copy of a parameter, and Adam's moments."""


@dataclass(frozen=True)
class Owned:
    """The part of a parameter whose optimizer state this rank keeps."""

    parameter: nn.Parameter
    start: int
    """The first element, of the parameter as it lies flat in this rank's memory."""
    state: dict[str, Tensor]
    """By ``STATE_KEYS``: flat, fp32, the live memory."""

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.state["param"].numel()


class OwningOptimizer(distrib_optimizer.DistributedOptimizer):  # type: ignore[misc]
    """Tells what it owns."""

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
    """Keeps one step count in the groups of a state dict and one per parameter in memory.

    Updates in one pass (torch's fused AdamW), which the factory does not ask for: on a CPU the default makes ten. The
    same pass clips.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._update_in_one_pass()

    def _update_in_one_pass(self) -> None:
        for group in self.optimizer.param_groups:
            group.update(fused=True, foreach=False)

    def clip(self, max_norm: float, norm: float) -> None:
        """As ``OwningOptimizer.clip``, in the next update."""
        excess = (norm + 1e-6) / max_norm
        # Torch's fused update divides the gradients by this.
        self.optimizer.grad_scale = torch.tensor(excess) if excess > 1 else None

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters' own state."""
        self._fill_state()
        inner = self.optimizer.state_dict()
        step = next((float(s["step"]) for s in inner["state"].values()), 0.0)
        groups = [
            {k: v for k, v in group.items() if k != "params"} | {"step": step} for group in inner["param_groups"]
        ]
        return {"optimizer": {"param_groups": groups}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, and give every parameter a step count of its own."""
        self._fill_state()
        super().load_state_dict(state_dict)
        self._update_in_one_pass()
        step = float(state_dict["optimizer"]["param_groups"][0]["step"])
        for parameter, state in self.optimizer.state.items():
            state["step"] = torch.full((), step, device=parameter.device)

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
