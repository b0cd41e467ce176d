"""Causal softmax attention with grouped queries: the Transformer baseline."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ...configs.stack import AttentionSegment, SharedKV, SlidingWindowSegment
from ...kernels.attention import attention
from ...parallel.parameters import linear_default
from ..heads import merge_heads, rotate, split_heads
from ..over_context import attend
from ..sequences import Sequences
from ..site import Site
from .base import Mixer, mean_keys, projection_flops


class Attention(Mixer[AttentionSegment | SlidingWindowSegment]):
    """softmax(Q K^T / sqrt d) V under a causal mask; query head i uses K,V head i // (heads / kv_heads)."""

    def __init__(
        self, segment: AttentionSegment | SlidingWindowSegment, site: Site, shared_kv: SharedKV | None
    ) -> None:
        super().__init__(segment, site, shared_kv)
        self.groups = segment.groups // site.tensor_size
        queries, pairs = segment.heads * self.width, segment.groups * self.width
        law = linear_default(site.model.hidden_size)
        self.input = self.project_in({"query": queries, "key": pairs, "value": pairs}, law)
        self.output = self.project_out(queries, linear_default(queries))

    def mix(self, sequences: Sequences, kv: Tensor | None, *projections: Tensor) -> Tensor:
        q, k, v = projections
        q = rotate(split_heads(q, self.heads), self.segment.rope, sequences.share)
        k = rotate(split_heads(k, self.groups), self.segment.rope, sequences.share)
        return merge_heads(self.attend(q, k, split_heads(v, self.groups), sequences))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
        """Rotated q (B, heads, S, d), k and v (B, groups, S, d) of this rank's tokens -> (B, heads, S, d)."""
        core = partial(attention, backend=self.site.kernels)
        return attend(core, q, k, v, sequences=sequences)

    @classmethod
    def flops_per_token(
        cls,
        segment: AttentionSegment | SlidingWindowSegment,
        shared_kv: SharedKV | None,
        hidden_size: int,
        sequence_length: int,
    ) -> float:
        width = segment.width(hidden_size)
        projections = projection_flops(hidden_size, 2 * width * (segment.heads + segment.groups))
        window = segment.window if isinstance(segment, SlidingWindowSegment) else None
        return projections + 4 * segment.heads * width * mean_keys(sequence_length, window)
