"""The layers of one pipeline stage."""

from __future__ import annotations

from torch import Tensor, nn

from ..configs.stack import LayerPlan
from .block import Block
from .shared_kv import SharedKVProducer
from .site import Site


class Decoder(nn.Module):
    """A run of layers, threading the hidden state and the shared K,V through them.

    Shared K,V is produced on the stage of the layer that follows its place in the stack, so that a boundary which
    coincides with that place carries hidden states only.
    """

    def __init__(self, plans: tuple[LayerPlan, ...], site: Site) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(plan, site) for plan in plans)
        self.shared_kv = nn.ModuleDict(
            {str(p.index): SharedKVProducer(p.produces, site.at_layer(p.index)) for p in plans if p.produces}
        )

    def blocks(self) -> list[Block]:
        """The layers in order."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def flops_per_token(self, sequence_length: int) -> float:
        """Forward operations per token of these layers and of the shared K,V they produce."""
        producers = [p for p in self.shared_kv.values() if isinstance(p, SharedKVProducer)]
        shared = sum((producer.flops_per_token() for producer in producers), 0.0)
        return shared + sum(block.flops_per_token(sequence_length) for block in self.blocks())

    def forward(self, x: Tensor, kv: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (S_local, B, D), K,V received from the stage before -> the same after these layers."""
        for layer in self.layers:
            producer = str(layer.index)
            if producer in self.shared_kv:
                kv = self.shared_kv[producer](x)
            x = layer(x, kv)
        return x, kv
