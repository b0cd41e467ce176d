"""Replicated parameters used where activations are sharded: their gradients are sums over the ranks that share them."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor, nn


def in_head_region(parameter: nn.Parameter, groups: ProcessGroupCollection) -> Tensor:
    """A replicated parameter as seen by this rank's heads: identity forward, sum over tensor ranks backward.

    Each rank's heads give only a part of the gradient. Built into the graph, the sum holds with and without
    sequence parallelism; a flag on the parameter would work only with it.
    """
    out: Tensor = copy_to_tensor_model_parallel_region(parameter, group=groups.tp)
    return out


def mark_sequence_region(parameter: nn.Parameter, sequence_parallel: bool) -> nn.Parameter:
    """Mark a replicated parameter that meets whole tokens (a pre-norm's weight).

    Without sequence parallelism every tensor rank sees all tokens and computes the whole gradient; with it each
    sees its share of the tokens, and Megatron-Core sums the gradients of marked parameters at the end of the step.
    """
    parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
    return parameter
