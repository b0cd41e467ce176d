"""Differential attention V2: twice the query heads, a sigmoid lambda per token and head, no head norm."""

from __future__ import annotations

import torch
from torch import Tensor

from ...configs.stack import DifferentialV2Segment, SharedKV
from ...kernels.differential import differential_attention_v2
from ...parallel.parameters import linear_default
from ..heads import merge_heads, rotate, split_heads
from ..site import Site
from .base import Mixer, mean_keys


class DifferentialV2(Mixer[DifferentialV2Segment]):
    """o_i = a_2i - sigmoid(x W_lambda)_i a_2i+1, where a is ordinary grouped attention over 2 * heads queries.

    The two subtracted heads share one K,V head. lambda's rows are sharded by head, so nothing is replicated.
    """

    def __init__(self, segment: DifferentialV2Segment, site: Site, shared_kv: SharedKV | None) -> None:
        super().__init__(segment, site, shared_kv)
        self.groups = segment.groups // site.tensor_size
        outputs, pairs = segment.heads * self.width, segment.groups * self.width
        rows = {"query": 2 * outputs, "key": pairs, "value": pairs, "lambda": segment.heads}
        self.input = self.project_in(rows, linear_default(site.model.hidden_size))
        self.output = self.project_out(outputs, linear_default(outputs))

    def forward(self, x: Tensor, kv: Tensor | None) -> Tensor:
        q, k, v, lam = self.input(x)
        q = rotate(split_heads(q, 2 * self.heads), self.segment.rope)
        k = rotate(split_heads(k, self.groups), self.segment.rope)
        lam = torch.sigmoid(lam.float() if lam.dtype != torch.float64 else lam).permute(1, 2, 0)  # (B, heads, S)
        o = differential_attention_v2(q, k, split_heads(v, self.groups), lam)
        out: Tensor = self.output(merge_heads(o))
        return out

    def flops_per_token(self, sequence_length: int) -> float:
        segment = self.segment
        projections = self.projection_flops(self.width * (3 * segment.heads + 2 * segment.groups) + segment.heads)
        return projections + 8 * segment.heads * self.width * mean_keys(sequence_length)
