"""The part of differential attention V1 that its self- and cross-attention forms share: lambda and the head norm."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from ..kernels.differential import differential_attention
from ..kernels.norm import HeadNorm
from ..kernels.precision import accumulation_dtype
from ..parallel.parameters import ONES, Law, replicated
from ..parallel.regions import in_head_region
from .over_context import SoftmaxCore
from .site import Site

SUB_NORM_EPS = 1e-5
LAMBDA_LAW = Law("normal", 0.1)


def lambda_init(layer: int) -> float:
    """0.8 - 0.6 exp(-0.3 layer) for the global layer index from 0 (the paper counts from 1)."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


class DifferentialHeads(nn.Module):
    """(A1 - lambda A2) V per pair, RMSNorm over the pair's 2d values, times 1 - lambda_init (arXiv 2410.05258).

    lambda = exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init, one for the layer. Its vectors and the norm's weight are
    replicated over tensor ranks, each of which sees its own pairs only.
    """

    def __init__(self, head_dim: int, site: Site) -> None:
        super().__init__()
        self.groups, self.kernels = site.groups, site.kernels
        self.lambda_init = lambda_init(site.layer)
        self.lambda_q1 = replicated("lambda_q1", (head_dim,), LAMBDA_LAW, site.device)
        self.lambda_k1 = replicated("lambda_k1", (head_dim,), LAMBDA_LAW, site.device)
        self.lambda_q2 = replicated("lambda_q2", (head_dim,), LAMBDA_LAW, site.device)
        self.lambda_k2 = replicated("lambda_k2", (head_dim,), LAMBDA_LAW, site.device)
        self.sub_norm = replicated("sub_norm", (2 * head_dim,), ONES, site.device)

    def current_lambda(self) -> Tensor:
        """lambda of this layer, a scalar in fp32 (fp64 if the vectors are)."""
        vectors = (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2)
        q1, k1, q2, k2 = (in_head_region(v, self.groups).to(accumulation_dtype(v)) for v in vectors)
        return torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + self.lambda_init

    def core(self) -> SoftmaxCore:
        """The attention of the pairs with its norm: q (B, 2h, S, d), k (B, 2g, S, d), v (B, g, S, 2d) -> (B, h, S, 2d).

        Head 2i + s is map s of pair i.
        """
        norm = HeadNorm(in_head_region(self.sub_norm, self.groups), SUB_NORM_EPS, 1.0 - self.lambda_init)
        return partial(differential_attention, lam=self.current_lambda(), head_norm=norm, backend=self.kernels)
