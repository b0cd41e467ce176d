"""Where a module is built: the model it belongs to, its layer, and this rank's share of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from ..configs.schema import Model


@dataclass(frozen=True)
class Site:
    """What every module of the model needs to know to build its share."""

    model: Model
    engine: TransformerConfig
    groups: ProcessGroupCollection
    device: torch.device
    recompute: Literal["none", "selective", "full"] = "none"
    """Which activations the backward pass computes again (``train.recompute``)."""
    layer: int = 0
    """Global index of the layer, from 0: never the index within a pipeline stage."""

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
