"""Megatron-Core's data parallelism over gradient buffers that are not zeroed (``main_gradients``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import nn

from . import cpu
from .linear import ColumnLinear, RowLinear
from .main_gradients import add_gradient, overwrites


class DataParallel(DistributedDataParallel):  # type: ignore[misc]
    """Megatron-Core's wrapper without overlapped reductions, over stale buffers.

    On a CPU the linear maps' products are taken right into them (``cpu``).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fused = self.config.gradient_accumulation_fusion
        if cpu.installed():
            for module in self.module.modules():
                if isinstance(module, ColumnLinear | RowLinear):
                    module.gradient_accumulation_fusion = True

    def zero_grad_buffer(self) -> None:
        """Begin a step."""
        if self._fused:
            return super().zero_grad_buffer()  # type: ignore[no-any-return]
        for parameter in self.params_with_grad:
            parameter.main_grad.stale = True
        for group in self.bucket_groups:
            group.reset()

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """End the backward passes of a step: reduce the gradients over data-parallel ranks."""
        for parameter in self.params_with_grad:
            if overwrites(parameter.main_grad):
                parameter.main_grad.zero_()
        super().finish_grad_sync(force_all_reduce=force_all_reduce)

    def _make_backward_post_hook(self, parameter: nn.Parameter) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if parameter.grad is not None and not parameter.grad_added_to_main_grad:  # type: ignore[attr-defined]
                add_gradient(parameter.main_grad, parameter.grad)  # type: ignore[attr-defined]
            parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
            parameter.grad = None

        return hook
