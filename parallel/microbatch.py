"""What one rank takes through the model at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Microbatch(NamedTuple):
    """Whole sequences: each context-parallel rank takes its share of them inside the model."""

    tokens: Tensor
    """(b, S) int64 token ids."""
    labels: Tensor
    """(b, S) int64 ids to predict."""
    document_start: Tensor | None = None
    """(b, S) int64: for each token the position in the window at which its document starts, 0 where it began before
    the window. None where tokens see the whole window."""


Microbatches = Iterator[Microbatch]
"""The microbatches of one step or evaluation, all of one shape (``configs.ramps.StepShape``)."""
