"""Causal softmax attention with grouped queries: the Transformer baseline."""

from __future__ import annotations

from torch import Tensor

from ...configs.stack import AttentionSegment, SharedKV, SlidingWindowSegment
from ...kernels.attention import attention
from ...parallel.parameters import linear_default
from ..heads import merge_heads, rotate, split_heads
from ..site import Site
from .base import Mixer, mean_keys


class Attention(Mixer[AttentionSegment | SlidingWindowSegment]):
    """softmax(Q K^T / sqrt d) V under a causal mask; query head i uses K,V head i // (heads / kv_heads)."""

    window: int | None = None

    def __init__(
        self, segment: AttentionSegment | SlidingWindowSegment, site: Site, shared_kv: SharedKV | None
    ) -> None:
        super().__init__(segment, site, shared_kv)
        self.groups = segment.groups // site.tensor_size
        queries, pairs = segment.heads * self.width, segment.groups * self.width
        law = linear_default(site.model.hidden_size)
        self.input = self.project_in({"query": queries, "key": pairs, "value": pairs}, law)
        self.output = self.project_out(queries, linear_default(queries))

    def forward(self, x: Tensor, kv: Tensor | None) -> Tensor:
        q, k, v = self.input(x)
        q = rotate(split_heads(q, self.heads), self.segment.rope)
        k = rotate(split_heads(k, self.groups), self.segment.rope)
        o = attention(q, k, split_heads(v, self.groups), window=self.window)
        out: Tensor = self.output(merge_heads(o))
        return out

    def flops_per_token(self, sequence_length: int) -> float:
        segment = self.segment
        projections = self.projection_flops(2 * self.width * (segment.heads + segment.groups))
        return projections + 4 * segment.heads * self.width * mean_keys(sequence_length, self.window)
