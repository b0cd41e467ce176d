"""One layer of the stack."""

from __future__ import annotations

from torch import Tensor, nn

from ..configs.stack import LayerPlan
from .feed_forward import FeedForward
from .norm import RMSNorm
from .registry import build_mixer
from .sequences import Sequences
from .site import Site


class Block(nn.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x)): the pre-norm block that all the papers share."""

    def __init__(self, plan: LayerPlan, site: Site) -> None:
        super().__init__()
        site = site.at_layer(plan.index)
        self.index, self.is_cross = plan.index, plan.is_cross
        self.mixer_norm = RMSNorm(site)
        self.mixer = build_mixer(plan, site)
        self.feed_forward_norm = RMSNorm(site)
        self.feed_forward = FeedForward(site)

    def forward(self, x: Tensor, kv: Tensor | None, sequences: Sequences) -> Tensor:
        """x (S_local, B, D) and, for a cross layer, the shared K,V of whole sequences -> (S_local, B, D)."""
        x = x + self.mixer(self.mixer_norm(x), kv, sequences)
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out
