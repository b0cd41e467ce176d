"""Multi-scale retention, RetNet's mixer."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ...configs.stack import RetentionSegment, SharedKV
from ...kernels.norm import rms_norm
from ...kernels.retention import CHUNK, fixed_decay_log
from ...parallel.parameters import Section, xavier_uniform
from ..heads import merge_heads, rotate, split_heads
from ..over_context import retain
from ..sequences import Sequences
from ..site import Site
from .base import RETENTION_GAIN, Mixer, projection_flops


class Retention(Mixer[RetentionSegment]):
    """o_n = sum_{m<=n} gamma^(n-m) (q_n . k_m) v_m, RMSNorm per head, times silu(x W_g) (arXiv 2307.08621).

    Scores are not normalised: the head norm removes any factor per token and head, up to its eps. gamma depends on
    the *global* head index.
    """

    def __init__(self, segment: RetentionSegment, site: Site, shared_kv: SharedKV | None) -> None:
        super().__init__(segment, site, shared_kv)
        hidden = site.model.hidden_size
        self.value_width = segment.value_head_dim or self.width
        keys, values = segment.heads * self.width, segment.heads * self.value_width
        rows = {"query": keys, "key": keys, "value": values, "gate": values}
        self.input = self.project_in_sections(
            [Section(name, (n, hidden), xavier_uniform(hidden, n, RETENTION_GAIN)) for name, n in rows.items()]
        )
        self.output = self.project_out(values, xavier_uniform(values, hidden, 2**-1.0))

    def mix(self, sequences: Sequences, kv: Tensor | None, *projections: Tensor) -> Tensor:
        q, k, v, gate = projections
        q = rotate(split_heads(q, self.heads), self.segment.rope, sequences.share)
        k = rotate(split_heads(k, self.heads), self.segment.rope, sequences.share) * self.width**-0.5
        v = split_heads(v, self.heads)
        o = retain(q, k, v, self._log_decay(q), backend=self.site.kernels, sequences=sequences)
        return F.silu(gate) * merge_heads(rms_norm(o, None, self.segment.norm_eps))

    def _log_decay(self, like: Tensor) -> Tensor:
        first = self.site.tensor_rank * self.heads
        return _decays(self.heads, first, self.segment.heads, self.segment.decay, like.device)

    @classmethod
    def flops_per_token(
        cls, segment: RetentionSegment, shared_kv: SharedKV | None, hidden_size: int, sequence_length: int
    ) -> float:
        heads, keys = segment.heads, segment.width(hidden_size)
        values = segment.value_head_dim or keys
        chunk = min(CHUNK, sequence_length)
        projections = projection_flops(hidden_size, heads * (2 * keys + 3 * values))
        return projections + heads * (2 * mean_chunk(chunk) * (keys + values) + 4 * keys * values)


@lru_cache(maxsize=32)
def _decays(
    heads: int, first: int, total: int, schedule: Literal["default", "experiments"], device: torch.device
) -> Tensor:
    return fixed_decay_log(heads, first=first, total=total, schedule=schedule).to(device)


def mean_chunk(chunk: int) -> float:
    """Mean number of keys a query meets within its own chunk."""
    return (chunk + 1) / 2
