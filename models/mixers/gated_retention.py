"""Gated retention, the mixer of YOCO's self-decoder."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...configs.stack import GatedRetentionSegment, SharedKV
from ...kernels.norm import rms_norm
from ...kernels.retention import retention
from ...parallel.parameters import Section, xavier_uniform
from ..heads import merge_heads, rotate, split_heads
from ..site import Site
from .base import RETENTION_GAIN, Mixer
from .retention import CHUNK, mean_chunk


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

    def forward(self, x: Tensor, kv: Tensor | None) -> Tensor:
        q, k, v, gate, decay = self.input(x)
        q = rotate(split_heads(q, self.heads), self.segment.rope)
        k = rotate(split_heads(k, self.heads), self.segment.rope) * self.width**-0.5
        decay = decay.permute(1, 2, 0)  # (B, heads, S)
        decay = decay if decay.dtype == torch.float64 else decay.float()
        log_decay = F.logsigmoid(decay) / self.segment.gate_normalizer
        o, _ = retention(q, k, split_heads(v, self.heads), log_decay, chunk_size=CHUNK)
        o = merge_heads(rms_norm(o, None, self.segment.norm_eps))
        out: Tensor = self.output(F.silu(gate) * o)
        return out

    def flops_per_token(self, sequence_length: int) -> float:
        heads, width = self.segment.heads, self.width
        projections = self.projection_flops(heads * (5 * width + 1))
        return projections + heads * (4 * mean_chunk(min(CHUNK, sequence_length)) * width + 4 * width * width)
