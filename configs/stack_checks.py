"""Whether the segments of a stack fit together: their order, their head counts and their widths."""

from __future__ import annotations

from .errors import UsageError
from .remedies import divisors, listed, nearest_multiples
from .schema import Model
from .stack import (
    AnyMixerSegment,
    CrossSegment,
    DifferentialCrossAttentionSegment,
    GroupedSegment,
    Segment,
    SharedKV,
    SharedKVSegment,
)


def check_stack(model: Model) -> None:
    """Raise UsageError, in one sentence, for the first thing in ``model.stack`` that cannot be built."""
    _check_layers(model.stack)
    _check_shared_kv_is_read(model.stack)
    source: tuple[str, SharedKV] | None = None
    for index, segment in enumerate(model.stack):
        key = f"model.stack.{index}"
        if isinstance(segment, SharedKVSegment):
            source = f"{key}.shared_kv", segment.shared_kv
            _check_even(f"{key}.shared_kv.head_dim", segment.shared_kv.head_dim)
        elif isinstance(segment, CrossSegment):
            _check_cross(key, segment, source)
        else:
            _check_width(key, segment, model.hidden_size)
            if isinstance(segment, GroupedSegment):
                _check_groups(key, segment)


def pairs_of(shared: SharedKV) -> int:
    """K,V heads of ``shared`` as differential cross-attention counts them: in pairs."""
    return shared.kv_heads // 2


def _check_layers(stack: tuple[Segment, ...]) -> None:
    if all(isinstance(segment, SharedKVSegment) for segment in stack):
        raise UsageError("model.stack has no layers: give it at least one segment with a mixer")


def _check_shared_kv_is_read(stack: tuple[Segment, ...]) -> None:
    unread: int | None = None
    for index, segment in enumerate(stack):
        if isinstance(segment, SharedKVSegment):
            _refuse_unread(unread)
            unread = index
        elif isinstance(segment, CrossSegment):
            unread = None
    _refuse_unread(unread)


def _refuse_unread(index: int | None) -> None:
    if index is not None:
        raise UsageError(
            f"model.stack.{index}.shared_kv is read by no layer: put cross_attention or "
            "differential_cross_attention after it, or remove it"
        )


def _check_width(key: str, segment: AnyMixerSegment, hidden_size: int) -> None:
    if segment.head_dim is not None:
        _check_even(f"{key}.head_dim", segment.head_dim)
    elif hidden_size % segment.width_shares or hidden_size // segment.width_shares % 2:
        raise _indivisible_width(key, segment, hidden_size)


def _indivisible_width(key: str, segment: AnyMixerSegment, hidden_size: int) -> UsageError:
    shares, heads = segment.width_shares, segment.heads
    fitting = [count for count in divisors(hidden_size) if hidden_size % (2 * count * shares // heads) == 0]
    close = sorted(sorted(fitting, key=lambda count: abs(count - heads))[:4])
    remedy = (
        f"set {key}.head_dim, or {key}.heads to one of {listed(close)}" if close else f"set {key}.head_dim"
    )
    in_pairs = " pairs of" if shares != heads else ""
    return UsageError(
        f"model.hidden_size={hidden_size} cannot be divided into {key}.heads={heads}{in_pairs} heads of one even "
        f"width: {remedy}"
    )


def _check_even(key: str, width: int) -> None:
    if width % 2:
        raise UsageError(
            f"{key}={width} is odd, and rotary position embedding turns pairs of dimensions: "
            f"use {nearest_multiples(width, 2)}"
        )


def _check_groups(key: str, segment: GroupedSegment) -> None:
    if segment.heads % segment.groups:
        raise UsageError(
            f"{key}.kv_heads={segment.groups} does not divide {key}.heads={segment.heads}: "
            f"use one of {listed(divisors(segment.heads))}"
        )


def _check_cross(key: str, segment: CrossSegment, source: tuple[str, SharedKV] | None) -> None:
    if source is None:
        raise UsageError(
            f"{key} is {segment.mixer}, which reads a shared_kv, and none comes before it: "
            "put a shared_kv segment there"
        )
    shared_key, shared = source
    if segment.head_dim not in (None, shared.head_dim):
        raise UsageError(
            f"{key}.head_dim={segment.head_dim} is not {shared_key}.head_dim={shared.head_dim}, the width that its "
            "queries must have: leave it out"
        )
    groups, counted = shared.kv_heads, ""
    if isinstance(segment, DifferentialCrossAttentionSegment):
        if shared.kv_heads % 2:
            raise UsageError(
                f"{shared_key}.kv_heads={shared.kv_heads} is odd, and {key} (differential_cross_attention) takes "
                f"K,V heads in pairs: use {nearest_multiples(shared.kv_heads, 2)}"
            )
        groups, counted = pairs_of(shared), f", which is {pairs_of(shared)} pairs"
    if segment.heads % groups:
        raise UsageError(
            f"{key}.heads={segment.heads} is not a multiple of the K,V heads it reads "
            f"({shared_key}.kv_heads={shared.kv_heads}{counted}): use {nearest_multiples(segment.heads, groups)}"
        )
