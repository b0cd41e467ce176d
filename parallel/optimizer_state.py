"""Megatron-Core's distributed optimizer with its state saved and loaded right.

Two faults of 0.16.1 are mended here, in a subclass that the engine builds in its place on every device.

*Padding.* The elements of a gradient buffer lie in buckets, each padded to a common multiple. A fully reshardable
checkpoint joins the buckets without their padding, yet cuts the parameters out at their padded offsets. With more
than one bucket (tied embeddings have one of their own, large models many) every parameter behind the first padding
is silently shifted.

*Step counts.* Without Transformer Engine or apex the optimizer wraps torch's Adam, which keeps a step count per
parameter where the fused ones keep one per group. Megatron-Core then (1) cannot describe its state before the first
step, nor on a rank that owns no element of any parameter, (2) copies a tensor named ``step`` that no checkpoint
holds, and (3) gives all parameters the *same* step tensor on loading, so that every step counts as many as there are
parameters and the bias correction after a resume is silently wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import megatron.core.optimizer as engine_optimizer
import torch
from megatron.core.optimizer import distrib_optimizer
from torch import Tensor


class ReshardableOptimizer(distrib_optimizer.DistributedOptimizer):  # type: ignore[misc]
    """Cuts parameters out of joined buckets at the offsets that they have without padding."""

    def sharded_param_state_fully_reshardable(self, *args: Any, **kwargs: Any) -> Any:
        """As Megatron-Core's, with offsets that match the data."""
        padded = [buffer.param_index_map for buffer in self.buffers]
        for buffer in self.buffers:
            buffer.param_index_map = _without_padding(buffer)
        try:
            return super().sharded_param_state_fully_reshardable(*args, **kwargs)
        finally:
            for buffer, index_map in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = index_map


def _without_padding(buffer: Any) -> dict[Tensor, tuple[int, int, int]]:
    """(start, end, bucket) of each parameter of a gradient buffer, the padding of earlier buckets taken off."""
    shifts, padding = [], 0
    for bucket in buffer.buckets:
        shifts.append(padding)
        padding += bucket.grad_data.numel() - bucket.numel_unpadded
    return {
        parameter: (start - shifts[bucket], end - shifts[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


class TorchAdamOptimizer(ReshardableOptimizer):
    """Keeps one step count in the groups of a state dict and one per parameter in memory."""

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
        # The empty state that Megatron-Core would make lacks the step that its copy loop then asks for.
        self._fill_state()
        super().load_state_dict(state_dict)
        step = float(state_dict["optimizer"]["param_groups"][0]["step"])
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(step)

    def _fill_state(self) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)

    def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        parameter = self.optimizer.param_groups[group]["params"][order]
        step = self.optimizer.state[parameter]["step"]
        super()._set_main_param_and_optimizer_states(model_param, {"step": step} | tensors)


@contextmanager
def mended_optimizer() -> Iterator[None]:
    """Within it, Megatron-Core's factory builds the subclass that fits this machine's Adam."""
    original = engine_optimizer.DistributedOptimizer
    fused = distrib_optimizer.HAVE_APEX_OR_TE
    engine_optimizer.DistributedOptimizer = ReshardableOptimizer if fused else TorchAdamOptimizer
    try:
        yield
    finally:
        engine_optimizer.DistributedOptimizer = original
