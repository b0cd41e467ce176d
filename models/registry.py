"""Mixers by the name that a configuration gives them."""

from __future__ import annotations

from typing import Any

from ..configs.stack import LayerPlan
from .mixers.attention import Attention
from .mixers.base import Mixer
from .mixers.cross_attention import CrossAttention
from .mixers.differential import Differential
from .mixers.differential_cross_attention import DifferentialCrossAttention
from .mixers.differential_v2 import DifferentialV2
from .mixers.gated_retention import GatedRetention
from .mixers.retention import Retention
from .mixers.sliding_window import SlidingWindow
from .site import Site

MIXERS: dict[str, type[Mixer[Any]]] = {
    "attention": Attention,
    "sliding_window": SlidingWindow,
    "differential": Differential,
    "differential_v2": DifferentialV2,
    "retention": Retention,
    "gated_retention": GatedRetention,
    "cross_attention": CrossAttention,
    "differential_cross_attention": DifferentialCrossAttention,
}


def build_mixer(plan: LayerPlan, site: Site) -> Mixer[Any]:
    """The mixer of one layer of the stack."""
    return MIXERS[plan.segment.mixer](plan.segment, site, plan.shared_kv)
