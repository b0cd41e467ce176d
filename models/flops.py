"""Operations of the model's forward pass, known from the configuration alone."""

from __future__ import annotations

from ..configs.schema import Model
from ..configs.stack import LayerPlan
from .feed_forward import FeedForward
from .registry import MIXERS
from .shared_kv import SharedKVProducer


def layer_flops(plan: LayerPlan, model: Model, sequence_length: int) -> float:
    """Forward operations per token of one layer and of the shared K,V made just before it, over all tensor ranks."""
    mixer = MIXERS[plan.segment.mixer]
    flops = mixer.flops_per_token(plan.segment, plan.shared_kv, model.hidden_size, sequence_length)
    if plan.produces is not None:
        flops += SharedKVProducer.flops_per_token(plan.produces, model.hidden_size)
    return flops + FeedForward.flops_per_token(model)


def head_flops(model: Model) -> float:
    """Forward operations per token of the output layer. The embedding is a look-up and costs none."""
    return 2.0 * model.hidden_size * model.padded_vocabulary()
