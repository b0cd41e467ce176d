"""One layer of the stack."""

from __future__ import annotations

from torch import Tensor, nn

from ..configs.stack import LayerPlan
from .feed_forward import FeedForward
from .norm import RMSNorm
from .registry import build_mixer
from .site import Site


class Block(nn.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x)): the pre-norm block that all the papers share."""

    def __init__(self, plan: LayerPlan, site: Site) -> None:
        super().__init__()
        site = site.at_layer(plan.index)
        self.index = plan.index
        self.mixer_norm = RMSNorm(site)
        self.mixer = build_mixer(plan, site)
        self.feed_forward_norm = RMSNorm(site)
        self.feed_forward = FeedForward(site)

    def forward(self, x: Tensor, kv: Tensor | None) -> Tensor:
        """x (S_local, B, D) and the shared K,V in force -> (S_local, B, D)."""
        x = x + self.mixer(self.mixer_norm(x), kv)
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out

    def flops_per_token(self, sequence_length: int) -> float:
        """Forward operations per token, over all tensor ranks."""
        return self.mixer.flops_per_token(sequence_length) + self.feed_forward.flops_per_token()
