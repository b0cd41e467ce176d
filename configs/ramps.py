"""What a step takes, as a function of the samples consumed before it: batch size and sequence length may ramp up.

A sample is always a window of ``train.sequence_length``. While the sequence length ramps, each window is cut into as
many shorter sequences as fit, so that no token is left out, a step has the same tokens, and the count of consumed
samples remains the only position in the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from .schema import RampStage, Train


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the step takes in sum over all ranks."""

    samples: int
    """Windows of ``train.sequence_length``: the global batch size."""
    sequence_length: int
    pieces: int
    """Sequences that each window is cut into."""

    @property
    def tokens(self) -> int:
        """Tokens that are labels."""
        return self.samples * self.pieces * self.sequence_length


def full_shape(train: Train) -> StepShape:
    """The shape after all ramps, which evaluation always has."""
    return StepShape(train.global_batch_size, train.sequence_length, 1)


def shape_after(train: Train, consumed_samples: int) -> StepShape:
    """The shape of the step that begins when ``consumed_samples`` have been trained on."""
    batch = _stage_at(train.batch_ramp, consumed_samples)
    sequence = _stage_at(train.sequence_ramp, consumed_samples)
    length = sequence.sequence_length if sequence else train.sequence_length
    return StepShape(
        samples=batch.global_batch_size if batch else train.global_batch_size,
        sequence_length=length,
        pieces=train.sequence_length // length,
    )


def shapes_of(train: Train) -> list[StepShape]:
    """The different shapes that a step may have at any position, in the order of their first."""
    ends = {stage.until_samples for stage in (*train.batch_ramp, *train.sequence_ramp)}
    shapes = [shape_after(train, consumed) for consumed in sorted({0, *ends})]
    return list(dict.fromkeys(shapes))


_Stage = TypeVar("_Stage", bound=RampStage)


def _stage_at(ramp: tuple[_Stage, ...], consumed_samples: int) -> _Stage | None:
    return next((stage for stage in ramp if consumed_samples < stage.until_samples), None)
