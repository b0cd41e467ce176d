"""The sequences of one microbatch, as this rank sees them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..parallel.context import ContextParallel, SequenceShare


@dataclass(frozen=True)
class Sequences:
    """Which tokens this rank holds, and where the documents of the whole sequences start."""

    context: ContextParallel
    document_start: Tensor | None = None
    """(B, S) int64: the position at which each token's document starts; None where a window is one text."""
    recomputed: bool = False
    """Whether mixers run within activation recompute."""

    @property
    def share(self) -> SequenceShare:
        """The tokens held here."""
        return self.context.share

    def starts(self, span: range, first_key: int = 0) -> Tensor | None:
        """(B, len(span)): the start of the document of each token of ``span``, counted from key ``first_key``."""
        if self.document_start is None:
            return None
        return self.document_start[:, span.start : span.stop] - first_key

    def resets(self, span: range) -> Tensor | None:
        """(B, len(span)) bool: the tokens of ``span`` with which a document starts."""
        starts = self.starts(span)
        return None if starts is None else starts == torch.arange(span.start, span.stop, device=starts.device)
