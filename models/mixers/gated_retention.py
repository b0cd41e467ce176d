"""Gated retention, the mixer of YOCO's self-decoder."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...configs.stack import GatedRetentionSegment, SharedKV
from ...kernels.norm import rms_norm
from ...kernels.retention import CHUNK
from ...parallel.parameters import Section, xavier_uniform
from ..heads import merge_heads, rotate, split_heads
from ..over_context import retain
from ..sequences import Sequences
from ..site import Site
from .base import RETENTION_GAIN, Mixer, projection_flops
from .retention import mean_chunk


class GatedRetention(Mixer[GatedRetentionSegment]):
    """Retention whose decay is data-dependent: sigmoid(x W_decay)^(1/16) per token and head (arXiv 2405.05254)."""

    def __init__(self, segment: GatedRetentionSegment, site: Site, shared_kv: SharedKV | None) -> None:
        super().__init__(segment, site, shared_kv)
        hidden, full = site.model.hidden_size, segment.heads * self.width
        rows = {"query": full, "key": full, "value": full, "gate": full, "decay": segment.heads}
        self.input = self.project_in_sections(
            [Section(name, (n, hidden), xavier_uniform(hidden, n, RETENTION_GAIN)) for name, n in rows.items()]
        )
        self.output = self.project_out(full, xavier_uniform(full, hidden, 2**-1.0))

    def mix(self, sequences: Sequences, kv: Tensor | None, *projections: Tensor) -> Tensor:
        q, k, v, gate, decay = projections
        q = rotate(split_heads(q, self.heads), self.segment.rope, sequences.share)
        k = rotate(split_heads(k, self.heads), self.segment.rope, sequences.share) * self.width**-0.5
        decay = decay.permute(1, 2, 0)  # (B, heads, S)
        decay = decay if decay.dtype == torch.float64 else decay.float()
        log_decay = F.logsigmoid(decay) / self.segment.gate_normalizer
        o = retain(q, k, split_heads(v, self.heads), log_decay, backend=self.site.kernels, sequences=sequences)
        return F.silu(gate) * merge_heads(rms_norm(o, None, self.segment.norm_eps))

    @classmethod
    def flops_per_token(
        cls, segment: GatedRetentionSegment, shared_kv: SharedKV | None, hidden_size: int, sequence_length: int
    ) -> float:
        heads, width = segment.heads, segment.width(hidden_size)
        projections = projection_flops(hidden_size, heads * (5 * width + 1))
        return projections + heads * (4 * mean_chunk(min(CHUNK, sequence_length)) * width + 4 * width * width)
