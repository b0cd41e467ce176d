"""Linear maps of Transformer Engine, with the contracts of ``linear.py``, and the context that makes them 8-bit.

Written from the interfaces of megatron-core 0.16.1; Transformer Engine needs a GPU and was not there when this was
written, so nothing in here but the choice of the classes has run. Its histories of delayed scaling are its own: they
are not saved, and begin anew in a resumed run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from .linear import no_first_values
from .parameters import Blueprint, Law, Section, tag


class TEColumnLinear(TEColumnParallelLinear):  # type: ignore[misc]
    """``ColumnLinear`` by Transformer Engine."""

    def __init__(
        self, input_size: int, sections: Sequence[Section], config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(
            input_size, sum(section.shape[0] for section in sections), config=config, init_method=no_first_values,
            gather_output=False, bias=False, skip_bias_add=False, is_expert=False, tp_group=groups.tp,
        )  # fmt: skip
        blueprint = Blueprint(tuple(sections), partition=0)
        tag(self.weight, blueprint)
        self.local_rows = blueprint.local_rows(groups.tp.size())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """As ``ColumnLinear.forward``."""
        y, _ = super().forward(x)
        return torch.split(y, self.local_rows, dim=-1)


class TERowLinear(TERowParallelLinear):  # type: ignore[misc]
    """``RowLinear`` by Transformer Engine."""

    def __init__(
        self, input_size: int, output_size: int, law: Law, config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(
            input_size, output_size, config=config, init_method=no_first_values, bias=False, input_is_parallel=True,
            skip_bias_add=False, is_expert=False, tp_group=groups.tp,
        )  # fmt: skip
        tag(self.weight, Blueprint((Section("weight", (output_size, input_size), law),), partition=1))

    def forward(self, x: Tensor) -> Tensor:
        """As ``RowLinear.forward``."""
        y: Tensor
        y, _ = super().forward(x)
        return y


def fp8_context(config: TransformerConfig) -> AbstractContextManager[Any]:
    """Within it Transformer Engine's maps are 8-bit, and Megatron-Core's as ever; none where ``config.fp8`` is not set.

    One for all layers, as delayed scaling demands: layers that stay in bf16 have other maps (``linears_of``).
    """
    from megatron.core.fp8_utils import get_fp8_context

    context: AbstractContextManager[Any] = get_fp8_context(config)
    return context
