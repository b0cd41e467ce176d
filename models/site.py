"""Where a module is built: the model it belongs to, its layer, and this rank's share of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from ..configs.schema import Fp8, Model
from ..kernels.dispatch import Backend
from ..parallel.linears import Linears, linears_of


@dataclass(frozen=True)
class Site:
    """What every module of the model needs to know to build its share."""

    model: Model
    engine: TransformerConfig
    groups: ProcessGroupCollection
    device: torch.device
    recompute: Literal["none", "selective", "full"] = "none"
    """Which activations the backward pass computes again (``train.recompute``)."""
    kernels: Backend = "auto"
    """Which kernels the mixers run on (``kernels.backend``)."""
    layer: int = 0
    """Global index of the layer, from 0: never the index within a pipeline stage."""
    fp8: Fp8 | None = None
    """8-bit operands of linear maps (``precision.fp8``)."""

    @property
    def linears(self) -> Linears:
        """What this layer's linear maps are made of."""
        return linears_of(self.fp8, self.layer, self.engine.num_layers)

    @property
    def tensor_size(self) -> int:
        """Ranks over which heads, feed-forward columns and vocabulary rows are divided."""
        return int(self.groups.tp.size())

    @property
    def tensor_rank(self) -> int:
        """This rank's number among them."""
        return int(self.groups.tp.rank())

    def at_layer(self, layer: int) -> Site:
        """The same site at another layer."""
        return replace(self, layer=layer)
