"""YOCO's cross-decoder: this layer's queries on the shared K,V."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ...configs.stack import CrossAttentionSegment, SharedKV
from ...kernels.attention import attention
from ...parallel.parameters import linear_default
from ..heads import merge_heads, rotate, split_heads
from ..over_context import attend_whole
from ..sequences import Sequences
from ..shared_kv import shared_keys_values
from ..site import Site
from .base import Mixer, mean_keys, projection_flops


class CrossAttention(Mixer[CrossAttentionSegment]):
    """Causal attention whose keys and values are the model's one shared K,V; only queries and output are its own."""

    def __init__(self, segment: CrossAttentionSegment, site: Site, shared_kv: SharedKV | None) -> None:
        super().__init__(segment, site, shared_kv)
        self.kv = required_kv(shared_kv)
        self.groups = self.kv.kv_heads // site.tensor_size
        queries = segment.heads * self.kv.head_dim
        self.input = self.project_in({"query": queries}, linear_default(site.model.hidden_size))
        self.output = self.project_out(queries, linear_default(queries))

    def mix(self, sequences: Sequences, kv: Tensor | None, *projections: Tensor) -> Tensor:
        (q,) = projections
        q = rotate(split_heads(q, self.heads), self.kv.rope, sequences.share)
        k, v = shared_keys_values(present(kv))
        k, v = split_heads(k, self.groups), split_heads(v, self.groups)
        core = partial(attention, backend=self.site.kernels)
        return merge_heads(attend_whole(core, q, k, v, sequences=sequences))

    @classmethod
    def flops_per_token(
        cls, segment: CrossAttentionSegment, shared_kv: SharedKV | None, hidden_size: int, sequence_length: int
    ) -> float:
        queries = segment.heads * required_kv(shared_kv).head_dim
        return projection_flops(hidden_size, 2 * queries) + 4 * queries * mean_keys(sequence_length)


def required_kv(kv: SharedKV | None) -> SharedKV:
    """The shared K,V in force at a cross layer; ValueError where the stack has none."""
    if kv is None:
        raise ValueError("a layer attends to the shared K,V, but no shared_kv stands before it in the stack")
    return kv


def present(kv: Tensor | None) -> Tensor:
    """The shared K,V that reached this layer; RuntimeError where none was computed or received."""
    if kv is None:
        raise RuntimeError("no shared K,V reached a cross layer: the pipeline boundary did not carry it")
    return kv
