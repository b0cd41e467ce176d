"""Right step counts for torch's Adam inside Megatron-Core's distributed optimizer.

Without Transformer Engine or apex the distributed optimizer wraps torch's Adam, which keeps a step count per
parameter where the fused optimizers keep one per group. Megatron-Core 0.16.1 then (1) cannot describe its state
before the first step, nor on a rank that owns no element of any parameter, (2) copies a tensor named ``step`` that
no checkpoint holds, and (3) gives all parameters the *same* step tensor on loading, so that every step counts as
many as there are parameters and the bias correction after a resume is silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def torch_adam_optimizer() -> type | None:
    """A ``DistributedOptimizer`` that is right for torch's Adam, or None where a fused Adam is in use."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return None

    class TorchAdamDistributedOptimizer(distrib_optimizer.DistributedOptimizer):  # type: ignore[misc]
        """Keeps one step count in the groups of a state dict and one per parameter in memory."""

        def state_dict(self) -> dict[str, Any]:
            self._fill_state()
            inner = self.optimizer.state_dict()
            step = next((float(s["step"]) for s in inner["state"].values()), 0.0)
            groups = [
                {k: v for k, v in group.items() if k != "params"} | {"step": step}
                for group in inner["param_groups"]
            ]
            return {"optimizer": {"param_groups": groups}}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
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

    return TorchAdamDistributedOptimizer
