"""YOCO's cross-decoder: this layer's queries on the shared K,V."""

from __future__ import annotations

from torch import Tensor

from ...configs.stack import CrossAttentionSegment, SharedKV
from ...kernels.attention import attention
from ...parallel.parameters import linear_default
from ..heads import merge_heads, rotate, split_heads
from ..shared_kv import shared_keys_values
from ..site import Site
from .base import Mixer, mean_keys


class CrossAttention(Mixer[CrossAttentionSegment]):
    """Causal attention whose keys and values are the model's one shared K,V; only queries and output are its own."""

    def __init__(self, segment: CrossAttentionSegment, site: Site, shared_kv: SharedKV | None) -> None:
        super().__init__(segment, site, shared_kv)
        self.kv = required_kv(shared_kv, site.layer)
        self.groups = self.kv.kv_heads // site.tensor_size
        queries = segment.heads * self.kv.head_dim
        self.input = self.project_in({"query": queries}, linear_default(site.model.hidden_size))
        self.output = self.project_out(queries, linear_default(queries))

    def forward(self, x: Tensor, kv: Tensor | None) -> Tensor:
        (q,) = self.input(x)
        q = rotate(split_heads(q, self.heads), self.kv.rope)
        k, v = shared_keys_values(present(kv))
        o = attention(q, split_heads(k, self.groups), split_heads(v, self.groups))
        out: Tensor = self.output(merge_heads(o))
        return out

    def flops_per_token(self, sequence_length: int) -> float:
        queries = self.segment.heads * self.kv.head_dim
        return self.projection_flops(2 * queries) + 4 * queries * mean_keys(sequence_length)


def required_kv(kv: SharedKV | None, layer: int) -> SharedKV:
    """The shared K,V in force at a cross layer; ValueError where the stack has none."""
    if kv is None:
        raise ValueError(f"layer {layer} attends to the shared K,V, but no shared_kv stands before it in the stack")
    return kv


def present(kv: Tensor | None) -> Tensor:
    """The shared K,V that reached this layer; RuntimeError where none was computed or received."""
    if kv is None:
        raise RuntimeError("no shared K,V reached a cross layer: the pipeline boundary did not carry it")
    return kv
