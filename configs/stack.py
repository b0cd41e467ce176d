"""The stack: a model is a list of segments, each some layers of one mixer, or YOCO's one shared K,V.

A segment holds the geometry of its mixer (head counts and widths) and says what tensor parallelism must divide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveFloat, PositiveInt, Tag

Spacing = Literal["standard", "linspace"]


class Section(BaseModel):
    """Base of every part of the configuration: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Rotary(Section):
    """Rotary position embedding on interleaved pairs (2i, 2i+1).

    ``spacing`` sets the frequency of pair i of a head of width d: ``standard`` theta^(-2i/d) (RoFormer, Diff
    Transformer), ``linspace`` theta^(-i/(d/2-1)) (RetNet, YOCO). The two differ by up to 13 % at d = 128, so a
    checkpoint loaded under the wrong one is silently bad.
    """

    theta: PositiveFloat = 10_000.0
    spacing: Spacing = "standard"


LINSPACE = Rotary(spacing="linspace")


class MixerSegment(Section):
    """Consecutive layers with one mixer; ``heads`` are counted as the mixer's paper counts them."""

    layers: PositiveInt
    heads: PositiveInt
    head_dim: PositiveInt | None = None
    """Width of one query/key head; by default the hidden size divided evenly over the heads."""

    def width(self, hidden_size: int) -> int:
        """Width of one query/key head."""
        return self.head_dim or hidden_size // self.width_shares

    @property
    def width_shares(self) -> int:
        """Parts into which the hidden size is divided when ``head_dim`` is not given."""
        return self.heads

    def tensor_parallel_units(self) -> dict[str, int]:
        """Counts that ``parallel.tensor`` must divide, by key."""
        return {"heads": self.heads}


class GroupedSegment(MixerSegment):
    """A softmax mixer with grouped K,V heads (GQA); ``kv_heads`` defaults to ``heads``."""

    kv_heads: PositiveInt | None = None
    rope: Rotary = Rotary()

    @property
    def groups(self) -> int:
        """Number of K,V heads."""
        return self.kv_heads or self.heads

    def tensor_parallel_units(self) -> dict[str, int]:
        return {"heads": self.heads, "kv_heads": self.groups}


class AttentionSegment(GroupedSegment):
    """Causal softmax attention, the Transformer baseline."""

    mixer: Literal["attention"]


class SlidingWindowSegment(GroupedSegment):
    """Causal attention over the query's own token and the ``window`` - 1 before it."""

    mixer: Literal["sliding_window"]
    window: PositiveInt
    rope: Rotary = LINSPACE


class DifferentialSegment(GroupedSegment):
    """Differential attention V1 (arXiv 2410.05258): ``heads`` are pairs of softmax heads of width ``head_dim``."""

    mixer: Literal["differential"]

    @property
    def width_shares(self) -> int:
        return 2 * self.heads


class DifferentialV2Segment(GroupedSegment):
    """Differential attention V2: ``heads`` output heads, twice as many query heads, ordinary K,V heads.

    Each subtracted pair of query heads must share one K,V head, so ``kv_heads`` divides ``heads``.
    """

    mixer: Literal["differential_v2"]


class RetentionSegment(MixerSegment):
    """Multi-scale retention (arXiv 2307.08621)."""

    mixer: Literal["retention"]
    value_head_dim: PositiveInt | None = None
    """Width of one value head; by default that of the keys. The RetNet paper uses twice it."""
    decay: Literal["default", "experiments"] = "default"
    """``default``: gamma_h = 1 - 2^(-5-h); ``experiments``: the log-spaced schedule of the paper's runs."""
    norm_eps: PositiveFloat = 1e-6
    rope: Rotary = LINSPACE


class GatedRetentionSegment(MixerSegment):
    """Gated retention (arXiv 2405.05254): a decay per token and head, sigmoid(gate)^(1/gate_normalizer)."""

    mixer: Literal["gated_retention"]
    gate_normalizer: PositiveFloat = 16.0
    norm_eps: PositiveFloat = 1e-5
    rope: Rotary = LINSPACE


class CrossAttentionSegment(MixerSegment):
    """YOCO's cross-decoder: queries of this layer on the shared K,V (grouped over its K,V heads)."""

    mixer: Literal["cross_attention"]


class DifferentialCrossAttentionSegment(MixerSegment):
    """Differential attention V1 on the shared K,V: its K heads pair up, its V heads join into heads twice as wide."""

    mixer: Literal["differential_cross_attention"]

    @property
    def width_shares(self) -> int:
        return 2 * self.heads


class SharedKV(Section):
    """Geometry of YOCO's one global K,V: K and V each have ``kv_heads`` heads of width ``head_dim``."""

    kv_heads: PositiveInt
    head_dim: PositiveInt
    rope: Rotary = LINSPACE


class SharedKVSegment(Section):
    """Computes K,V once, from the residual stream at this point of the stack, for the cross mixers after it."""

    shared_kv: SharedKV


CrossSegment = CrossAttentionSegment | DifferentialCrossAttentionSegment
AnyMixerSegment = (
    AttentionSegment
    | SlidingWindowSegment
    | DifferentialSegment
    | DifferentialV2Segment
    | RetentionSegment
    | GatedRetentionSegment
    | CrossAttentionSegment
    | DifferentialCrossAttentionSegment
)

MIXERS: tuple[str, ...] = (
    "attention",
    "sliding_window",
    "differential",
    "differential_v2",
    "retention",
    "gated_retention",
    "cross_attention",
    "differential_cross_attention",
)


def _segment_tag(value: object) -> str | None:
    """Tell the union which segment a mapping (or an object) is, so that errors speak of that one alone."""
    if isinstance(value, dict):
        return "shared_kv" if "shared_kv" in value else value.get("mixer")
    return "shared_kv" if isinstance(value, SharedKVSegment) else getattr(value, "mixer", None)


Segment = Annotated[
    Annotated[AttentionSegment, Tag("attention")]
    | Annotated[SlidingWindowSegment, Tag("sliding_window")]
    | Annotated[DifferentialSegment, Tag("differential")]
    | Annotated[DifferentialV2Segment, Tag("differential_v2")]
    | Annotated[RetentionSegment, Tag("retention")]
    | Annotated[GatedRetentionSegment, Tag("gated_retention")]
    | Annotated[CrossAttentionSegment, Tag("cross_attention")]
    | Annotated[DifferentialCrossAttentionSegment, Tag("differential_cross_attention")]
    | Annotated[SharedKVSegment, Tag("shared_kv")],
    Discriminator(_segment_tag),
]

Stack = Annotated[tuple[Segment, ...], Field(min_length=1)]


@dataclass(frozen=True)
class LayerPlan:
    """One layer of the expanded stack.

    ``index`` is global and zero-based. ``produces`` is the shared K,V that is computed just before this layer, if
    any; ``shared_kv`` is the one in force at this layer (its own product included), whether it uses it or not.
    """

    index: int
    segment: AnyMixerSegment
    produces: SharedKV | None
    shared_kv: SharedKV | None

    @property
    def is_cross(self) -> bool:
        """Whether the layer attends to the shared K,V."""
        return isinstance(self.segment, CrossSegment)

    @property
    def has_lambda(self) -> bool:
        """Whether the layer has one learned lambda (differential attention V1)."""
        return isinstance(self.segment, DifferentialSegment | DifferentialCrossAttentionSegment)


def expand(stack: tuple[Segment, ...]) -> tuple[LayerPlan, ...]:
    """The layers of ``stack`` in order, each with the shared K,V in force there."""
    plans: list[LayerPlan] = []
    produces: SharedKV | None = None
    in_force: SharedKV | None = None
    for segment in stack:
        if isinstance(segment, SharedKVSegment):
            produces = in_force = segment.shared_kv
            continue
        for _ in range(segment.layers):
            plans.append(LayerPlan(len(plans), segment, produces, in_force))
            produces = None
    return tuple(plans)


SequenceOrder = Literal["contiguous", "zigzag"]
"""How the chunks of a sequence are dealt out to context ranks."""


def context_order(stack: tuple[Segment, ...]) -> SequenceOrder:
    """How context parallelism deals out a sequence: in which order its chunks go to the ranks.

    A causal query late in the sequence sees more keys than an early one. Where some mixer sees the whole past each
    of R ranks holds two of 2R chunks, r and 2R - 1 - r (``zigzag``), which balances that. Retention and windows
    cost the same everywhere, so stacks of these alone keep one chunk per rank (``contiguous``).
    """
    even = SlidingWindowSegment | RetentionSegment | GatedRetentionSegment | SharedKVSegment
    return "contiguous" if all(isinstance(segment, even) for segment in stack) else "zigzag"


def carried_kv(plans: tuple[LayerPlan, ...], first_layer: int) -> SharedKV | None:
    """The shared K,V that must enter a pipeline stage whose first layer is ``first_layer``, if any.

    It is carried when it was produced by an earlier layer and a cross layer from here on still reads it.
    """
    if first_layer >= len(plans) or plans[first_layer].produces is not None:
        return None
    for plan in plans[first_layer:]:
        if plan.produces is not None:
            return None
        if plan.is_cross:
            return plan.shared_kv
    return None
