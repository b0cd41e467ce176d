"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass

from ..configs.ramps import StepShape


@dataclass(frozen=True)
class Progress:
    """Counts since the start of the run, over all ranks. Batch sizes may change, so none follows from another."""

    step: int = 0
    """Steps done."""
    samples: int = 0
    """Samples trained on: the position in the data."""
    tokens: int = 0
    """Tokens trained on."""

    def after(self, shape: StepShape) -> Progress:
        """The counts after one more step."""
        return Progress(self.step + 1, self.samples + shape.samples, self.tokens + shape.tokens)
