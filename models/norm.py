"""RMSNorm over the hidden width, before each mixer, each feed-forward and the output layer."""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels.norm import rms_norm
from ..parallel.parameters import ONES, replicated
from ..parallel.regions import mark_sequence_region
from .site import Site


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension; statistics in fp32 (arXiv 1910.07467)."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        width = site.model.hidden_size
        self.eps = site.model.norm_eps
        self.weight = mark_sequence_region(
            replicated("weight", (width,), ONES, site.device), bool(site.engine.sequence_parallel)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), dtype kept."""
        return rms_norm(x, self.weight, self.eps)
