"""The feed-forward half of a block."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..configs.schema import Model
from ..kernels.activation import swiglu
from ..parallel.parameters import Section, linear_default
from .recompute import recomputed
from .site import Site


class FeedForward(nn.Module):
    """``swiglu``: fc2(silu(fc1 x) * gate x), where fc1 is the activated branch; ``gelu``: fc2(gelu(fc1 x))."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        model = site.model
        self.site = site
        width, inner = model.hidden_size, model.ffn_hidden_size
        names = ("fc1", "gate") if model.ffn_activation == "swiglu" else ("fc1",)
        sections = [Section(name, (inner, width), linear_default(width)) for name in names]
        self.input = site.linears.column(width, sections, site.engine, site.groups)
        self.fc2 = site.linears.row(inner, width, linear_default(inner), site.engine, site.groups)

    def forward(self, x: Tensor) -> Tensor:
        """(S_local, B, D) -> (S_local, B, D)."""
        branches = self.input(x)
        selective = self.site.recompute == "selective"
        activated = recomputed(_activate, *branches) if selective else _activate(*branches)
        out: Tensor = self.fc2(activated)
        return out

    @staticmethod
    def flops_per_token(model: Model) -> float:
        """Forward operations per token, over all tensor ranks."""
        products = 3 if model.ffn_activation == "swiglu" else 2
        return 2.0 * products * model.hidden_size * model.ffn_hidden_size


def _activate(activated: Tensor, linear: Tensor | None = None) -> Tensor:
    return F.gelu(activated) if linear is None else swiglu(activated, linear)
