"""Activations that are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def recomputed(function: Callable[..., T], *inputs: Any) -> T:
    """``function(*inputs)``, of which only the inputs are kept for the backward pass.

    ``function`` must draw no random numbers. Its collectives run once more in the backward pass, in the same order on
    every rank.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    result: T = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result
