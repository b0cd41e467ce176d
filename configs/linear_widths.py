"""The widths of a model's linear maps, as tensor parallelism divides them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .schema import Model
from .stack import (
    AnyMixerSegment,
    CrossSegment,
    DifferentialCrossAttentionSegment,
    DifferentialSegment,
    DifferentialV2Segment,
    GatedRetentionSegment,
    GroupedSegment,
    RetentionSegment,
    SharedKVSegment,
)


@dataclass(frozen=True)
class Width:
    """A number of rows or columns."""

    name: str
    """How a sentence names it."""
    size: int
    divided: bool = True
    """Whether tensor parallelism divides it."""
    narrow: bool = False
    """Whether it is one number per head, which is no multiple of anything."""


def linear_widths(model: Model) -> Iterator[Width]:
    """Every width of the linear maps of mixers, feed-forwards and shared K,V. Expects a stack that can be built."""
    yield Width(f"model.hidden_size={model.hidden_size}", model.hidden_size, divided=False)
    yield Width(f"model.ffn_hidden_size={model.ffn_hidden_size}", model.ffn_hidden_size)
    shared_width = 0
    for index, segment in enumerate(model.stack):
        if isinstance(segment, SharedKVSegment):
            kv = segment.shared_kv
            shared_width = kv.head_dim
            yield Width(f"the keys of model.stack.{index}.shared_kv", kv.kv_heads * kv.head_dim)
            continue
        width = shared_width if isinstance(segment, CrossSegment) else segment.width(model.hidden_size)
        for what, size in _projections(segment, width).items():
            if narrow := what in ("decay", "lambda"):
                name = f"model.stack.{index}.heads={size}, the width of its {what},"
            else:
                name = f"the {what} of model.stack.{index} ({segment.mixer})"
            yield Width(name, size, narrow=narrow)


def _projections(segment: AnyMixerSegment, width: int) -> dict[str, int]:
    """Rows of a mixer's input projections, and columns of its output's where these are others."""
    heads = segment.heads
    pairs = 2 if isinstance(segment, DifferentialSegment | DifferentialCrossAttentionSegment) else 1
    rows = {"queries": heads * width * pairs}
    if isinstance(segment, GroupedSegment):
        rows["keys"] = segment.groups * width * pairs
    if isinstance(segment, DifferentialV2Segment):
        rows |= {"queries": 2 * heads * width, "output": heads * width, "lambda": heads}
    if isinstance(segment, RetentionSegment):
        rows["values"] = heads * (segment.value_head_dim or width)
    if isinstance(segment, GatedRetentionSegment):
        rows["decay"] = heads
    return rows
