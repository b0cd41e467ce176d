"""Differential attention V1: the difference of two softmax maps."""

from __future__ import annotations

from torch import Tensor

from ...configs.stack import DifferentialSegment, SharedKV
from ...parallel.parameters import linear_default
from ..differential_heads import DifferentialHeads
from ..heads import merge_heads, rotate, split_heads
from ..over_context import attend
from ..sequences import Sequences
from ..site import Site
from .base import Mixer, mean_keys, projection_flops


class Differential(Mixer[DifferentialSegment]):
    """Pairs of softmax heads of width d that share one value head of width 2d (arXiv 2410.05258).

    ``heads`` and ``kv_heads`` count pairs. Rows of the query and key projections are ordered [pair][map][d].
    """

    def __init__(self, segment: DifferentialSegment, site: Site, shared_kv: SharedKV | None) -> None:
        super().__init__(segment, site, shared_kv)
        self.groups = segment.groups // site.tensor_size
        queries, pairs = 2 * segment.heads * self.width, 2 * segment.groups * self.width
        law = linear_default(site.model.hidden_size)
        self.input = self.project_in({"query": queries, "key": pairs, "value": pairs}, law)
        self.differential = DifferentialHeads(self.width, site)
        self.output = self.project_out(queries, linear_default(queries))

    def mix(self, sequences: Sequences, kv: Tensor | None, *projections: Tensor) -> Tensor:
        q, k, v = projections
        q = rotate(split_heads(q, 2 * self.heads), self.segment.rope, sequences.share)
        k = rotate(split_heads(k, 2 * self.groups), self.segment.rope, sequences.share)
        o = attend(self.differential.core(), q, k, split_heads(v, self.groups), sequences=sequences)
        return merge_heads(o)

    @classmethod
    def flops_per_token(
        cls, segment: DifferentialSegment, shared_kv: SharedKV | None, hidden_size: int, sequence_length: int
    ) -> float:
        width = segment.width(hidden_size)
        projections = projection_flops(hidden_size, 4 * width * (segment.heads + segment.groups))
        # Two score maps of width d and one product with values of width 2d: 6d multiply-adds were it two
        # products; the difference of the maps is taken first, so the values are read once.
        return projections + 2 * 4 * segment.heads * width * mean_keys(sequence_length)
