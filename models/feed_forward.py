"""The feed-forward half of a block."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.activation import swiglu
from ..parallel.linear import ColumnLinear, RowLinear
from ..parallel.parameters import Section, linear_default
from .site import Site


class FeedForward(nn.Module):
    """``swiglu``: fc2(silu(fc1 x) * gate x), where fc1 is the activated branch; ``gelu``: fc2(gelu(fc1 x))."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        model = site.model
        self.width, self.inner = width, inner = model.hidden_size, model.ffn_hidden_size
        names = ("fc1", "gate") if model.ffn_activation == "swiglu" else ("fc1",)
        self.products = len(names) + 1
        sections = [Section(name, (inner, width), linear_default(width)) for name in names]
        self.input = ColumnLinear(width, sections, site.engine, site.groups)
        self.fc2 = RowLinear(inner, width, linear_default(inner), site.engine, site.groups)

    def forward(self, x: Tensor) -> Tensor:
        """(S_local, B, D) -> (S_local, B, D)."""
        activated, *linear = self.input(x)
        out: Tensor = self.fc2(swiglu(activated, linear[0]) if linear else F.gelu(activated))
        return out

    def flops_per_token(self) -> float:
        """Forward operations per token, over all tensor ranks."""
        return 2.0 * self.products * self.width * self.inner
