"""YOCO's one global K,V: computed once from the residual stream, read by every cross layer after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..configs.stack import SharedKV
from ..parallel.parameters import Section, linear_default
from .heads import merge_heads, rotate, split_heads
from .norm import RMSNorm
from .sequences import Sequences
from .site import Site


class SharedKVProducer(nn.Module):
    """K = RoPE(RMSNorm(M) W_K^T), V = RMSNorm(M) W_V^T for the residual stream M (arXiv 2405.05254, section 2).

    Returns K and V of this tensor rank's heads side by side, (S, B, 2 * heads * d): that is what travels between
    pipeline stages, K already rotated.
    """

    def __init__(self, kv: SharedKV, site: Site) -> None:
        super().__init__()
        self.kv = kv
        self.heads = kv.kv_heads // site.tensor_size
        self.norm = RMSNorm(site)
        hidden = site.model.hidden_size
        law = linear_default(hidden)
        sections = [Section(name, (kv.kv_heads * kv.head_dim, hidden), law) for name in ("key", "value")]
        self.input = site.linears.column(hidden, sections, site.engine, site.groups)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """(S_local, B, D) -> (S, B, 2 * heads * d), S being the tokens of this context rank."""
        k, v = self.input(self.norm(x))
        k = merge_heads(rotate(split_heads(k, self.heads), self.kv.rope, sequences.share))
        return torch.cat([k, v], dim=-1)

    @staticmethod
    def flops_per_token(kv: SharedKV, hidden_size: int) -> float:
        """Forward operations per token, over all tensor ranks."""
        return 4.0 * hidden_size * kv.kv_heads * kv.head_dim


def shared_keys_values(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of what ``SharedKVProducer`` returned."""
    k, v = packed.chunk(2, dim=-1)
    return k, v
