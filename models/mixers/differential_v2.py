"""Differential attention V2: twice the query heads, a sigmoid lambda per token and head, no head norm."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...configs.stack import DifferentialV2Segment, SharedKV
from ...kernels.differential import differential_attention_v2
from ...kernels.dispatch import Backend
from ...parallel.parameters import linear_default
from ..heads import merge_heads, rotate, split_heads
from ..over_context import attend
from ..sequences import Sequences
from ..site import Site
from .base import Mixer, mean_keys, projection_flops


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

    def mix(self, sequences: Sequences, kv: Tensor | None, *projections: Tensor) -> Tensor:
        q, k, v, lam = projections
        q = rotate(split_heads(q, 2 * self.heads), self.segment.rope, sequences.share)
        k = rotate(split_heads(k, self.groups), self.segment.rope, sequences.share)
        v, lam = split_heads(v, self.groups), split_heads(lam, self.heads)
        return merge_heads(attend(partial(_attention, backend=self.site.kernels), q, k, v, lam, sequences=sequences))

    @classmethod
    def flops_per_token(
        cls, segment: DifferentialV2Segment, shared_kv: SharedKV | None, hidden_size: int, sequence_length: int
    ) -> float:
        width = segment.width(hidden_size)
        rows = width * (3 * segment.heads + 2 * segment.groups) + segment.heads
        return projection_flops(hidden_size, rows) + 8 * segment.heads * width * mean_keys(sequence_length)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, *logits: Tensor, document_start: Tensor | None, backend: Backend
) -> Tensor:
    """The kernel, with lambda's logits (B, heads, Sq, 1) as the queries' further input; the sigmoid is in fp32."""
    (logit,) = logits
    lam = torch.sigmoid(logit.squeeze(-1) if logit.dtype == torch.float64 else logit.squeeze(-1).float())
    return differential_attention_v2(q, k, v, lam, document_start=document_start, backend=backend)
