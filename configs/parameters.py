"""How many parameters a model has, in closed form from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UsageError
from .schema import Model
from .stack import (
    AnyMixerSegment,
    AttentionSegment,
    CrossAttentionSegment,
    CrossSegment,
    DifferentialCrossAttentionSegment,
    DifferentialSegment,
    DifferentialV2Segment,
    GatedRetentionSegment,
    RetentionSegment,
    SharedKV,
    SharedKVSegment,
    SlidingWindowSegment,
)


@dataclass(frozen=True)
class ParameterCount:
    """Trained numbers. ``embedding`` holds the output layer too, unless the two are tied."""

    embedding: int
    non_embedding: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.non_embedding


def count_parameters(model: Model) -> ParameterCount:
    """Count the parameters of ``model``, padding of the vocabulary included.

    Expects a stack that ``check_config`` accepts. Raises UsageError while ``model.vocabulary_size`` is not known.
    """
    if model.vocabulary_size is None:
        raise UsageError("model.vocabulary_size is not known: set it, or prepare the data that decides it")
    hidden = model.hidden_size
    matrices = 1 if model.tied_embeddings else 2
    final_norm = hidden
    return ParameterCount(
        embedding=matrices * model.padded_vocabulary() * hidden,
        non_embedding=_stack_parameters(model) + final_norm,
    )


def mixer_parameters(segment: AnyMixerSegment, hidden: int, width: int) -> int:
    """Parameters of one layer's mixer: ``hidden`` is the model's width D, ``width`` that of one query/key head d.

    Written as q + k + v + output, and what else there is. The projections have no bias.
    """
    heads = segment.heads
    projection = hidden * heads * width
    lambda_and_norm = 4 * width + 2 * width
    match segment:
        case AttentionSegment() | SlidingWindowSegment():
            grouped = hidden * segment.groups * width
            return projection + grouped + grouped + projection
        case DifferentialSegment():
            grouped = hidden * segment.groups * width
            return 2 * projection + 2 * grouped + 2 * grouped + 2 * projection + lambda_and_norm
        case DifferentialV2Segment():
            grouped = hidden * segment.groups * width
            token_lambda = hidden * heads
            return 2 * projection + grouped + grouped + projection + token_lambda
        case RetentionSegment():
            values = hidden * heads * (segment.value_head_dim or width)
            gate = values
            return projection + projection + values + values + gate
        case GatedRetentionSegment():
            gate, decay = projection, hidden * heads
            return projection + projection + projection + projection + gate + decay
        case CrossAttentionSegment():
            return projection + projection
        case DifferentialCrossAttentionSegment():
            return 2 * projection + 2 * projection + lambda_and_norm


def shared_kv_parameters(shared: SharedKV, hidden: int) -> int:
    """Parameters of YOCO's shared K,V: its norm, K and V."""
    grouped = hidden * shared.kv_heads * shared.head_dim
    return hidden + grouped + grouped


def ffn_parameters(model: Model) -> int:
    """Parameters of one layer's feed-forward network."""
    matrices = {"swiglu": 3, "gelu": 2}[model.ffn_activation]
    return matrices * model.hidden_size * model.ffn_hidden_size


def _stack_parameters(model: Model) -> int:
    hidden = model.hidden_size
    two_norms = 2 * hidden
    total, shared_width = 0, 0
    for segment in model.stack:
        if isinstance(segment, SharedKVSegment):
            shared_width = segment.shared_kv.head_dim
            total += shared_kv_parameters(segment.shared_kv, hidden)
            continue
        width = shared_width if isinstance(segment, CrossSegment) else segment.width(hidden)
        layer = mixer_parameters(segment, hidden, width) + ffn_parameters(model) + two_norms
        total += segment.layers * layer
    return total
