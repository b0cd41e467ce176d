"""The layers of one pipeline stage."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..configs.stack import LayerPlan
from ..parallel.linears import linears_context
from .block import Block
from .recompute import recomputed
from .sequences import Sequences
from .shared_kv import SharedKVProducer
from .site import Site


class Decoder(nn.Module):
    """A run of layers, threading the hidden state and the shared K,V through them.

    Shared K,V is produced on the stage of the layer that follows its place in the stack, so that a boundary which
    coincides with that place carries hidden states only. It is threaded, and travels between stages, as the K,V of
    this context rank's tokens; the first cross layer of a stage gathers that of whole sequences once for all.
    """

    def __init__(self, plans: tuple[LayerPlan, ...], site: Site) -> None:
        super().__init__()
        self.site = site
        self.layers = nn.ModuleList(Block(plan, site) for plan in plans)
        self.shared_kv = nn.ModuleDict(
            {str(p.index): SharedKVProducer(p.produces, site.at_layer(p.index)) for p in plans if p.produces}
        )

    def blocks(self) -> list[Block]:
        """The layers in order."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def forward(self, x: Tensor, kv: Tensor | None, sequences: Sequences) -> tuple[Tensor, Tensor | None]:
        """x (S_local, B, D), K,V received from the stage before -> the same after these layers."""
        with linears_context(self.site.fp8, self.site.engine):
            return self._through_layers(x, kv, sequences)

    def _through_layers(self, x: Tensor, kv: Tensor | None, sequences: Sequences) -> tuple[Tensor, Tensor | None]:
        whole: Tensor | None = None
        for layer in self.blocks():
            producer = str(layer.index)
            if producer in self.shared_kv:
                kv, whole = self.shared_kv[producer](x, sequences), None
            if layer.is_cross and whole is None and kv is not None:
                whole = sequences.context.gather(kv)
            inputs = (x, whole if layer.is_cross else None, sequences)
            x = recomputed(self._in_context, layer, *inputs) if self.site.recompute == "full" else layer(*inputs)
        return x, kv

    def _in_context(self, layer: Block, *inputs: Any) -> Tensor:
        """The layer in its maps' context, which the one around all layers does not reach in the backward pass."""
        with linears_context(self.site.fp8, self.site.engine):
            x: Tensor = layer(*inputs)
            return x
