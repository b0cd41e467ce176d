"""Differential attention V1 on YOCO's shared K,V."""

from __future__ import annotations

from torch import Tensor

from ...configs.stack import DifferentialCrossAttentionSegment, SharedKV
from ...parallel.parameters import linear_default
from ..differential_heads import DifferentialHeads
from ..heads import merge_heads, rotate, split_heads
from ..over_context import attend_whole
from ..sequences import Sequences
from ..shared_kv import shared_keys_values
from ..site import Site
from .base import Mixer, mean_keys, projection_flops
from .cross_attention import present, required_kv


class DifferentialCrossAttention(Mixer[DifferentialCrossAttentionSegment]):
    """Pairs of queries on pairs of shared K heads; neighbouring V heads of width d join into one of width 2d."""

    def __init__(self, segment: DifferentialCrossAttentionSegment, site: Site, shared_kv: SharedKV | None) -> None:
        super().__init__(segment, site, shared_kv)
        self.kv = required_kv(shared_kv)
        self.groups = self.kv.kv_heads // 2 // site.tensor_size
        queries = 2 * segment.heads * self.kv.head_dim
        self.input = self.project_in({"query": queries}, linear_default(site.model.hidden_size))
        self.differential = DifferentialHeads(self.kv.head_dim, site)
        self.output = self.project_out(queries, linear_default(queries))

    def mix(self, sequences: Sequences, kv: Tensor | None, *projections: Tensor) -> Tensor:
        (q,) = projections
        q = rotate(split_heads(q, 2 * self.heads), self.kv.rope, sequences.share)
        k, v = shared_keys_values(present(kv))
        k, v = split_heads(k, 2 * self.groups), split_heads(v, self.groups)
        o = attend_whole(self.differential.core(), q, k, v, sequences=sequences)
        return merge_heads(o)

    @classmethod
    def flops_per_token(
        cls,
        segment: DifferentialCrossAttentionSegment,
        shared_kv: SharedKV | None,
        hidden_size: int,
        sequence_length: int,
    ) -> float:
        queries = 2 * segment.heads * required_kv(shared_kv).head_dim
        return projection_flops(hidden_size, 2 * queries) + 4 * queries * mean_keys(sequence_length)
