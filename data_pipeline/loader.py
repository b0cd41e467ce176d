"""Batches as a pure function of the number of consumed samples, whatever the data-parallel size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..configs.ramps import StepShape
from .dataset import start_per_token
from .mixture import Mixture, SampleId
from .shards.reader import Damage


@dataclass(frozen=True, slots=True)
class Batch:
    """One microbatch: b sequences of s tokens, cut from ``sample_ids`` windows.

    b is the number of windows and s their length, except while the sequence length ramps up: then each window is cut
    into several shorter sequences that lie one behind the other.
    """

    tokens: torch.Tensor
    """(b, s) int64."""
    labels: torch.Tensor
    """(b, s) int64: the token that follows each of ``tokens``."""
    document_start: torch.Tensor | None
    """(b, s) int64: the position in the sequence of the first token of each token's document, 0 where the document
    began before the sequence. None where documents were not asked for."""
    sample_ids: tuple[SampleId, ...]
    """Which samples these are, for logs and tests."""


class DamagedSamples(Exception):
    """Some samples of a microbatch cannot be read."""

    def __init__(self, found: dict[SampleId, str]) -> None:
        super().__init__(found)
        self.found = found
        """What is wrong, by the sample whose place it is (that of a substitute counts for the sample it replaces)."""


class BatchLoader:
    """The microbatches of one data-parallel rank.

    Holds no position: the caller counts consumed samples, over all ranks, and that number is the only cursor.
    So a run may continue with another data-parallel size, microbatch or global batch and reads on exactly
    where it was.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        documents: bool = True,
    ) -> None:
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(f"rank {data_parallel_rank} is outside the data-parallel size {data_parallel_size}")
        self._mixture = mixture
        self._micro_batch_size, self._documents = micro_batch_size, documents
        self._rank, self._size = data_parallel_rank, data_parallel_size

    def plan(self, consumed_samples: int, global_batch_size: int) -> Iterator[tuple[SampleId, ...]]:
        """The samples of each of this rank's microbatches in the step that follows ``consumed_samples``, in order.

        Rank r has samples [r * B / size, (r + 1) * B / size) of the step's B = ``global_batch_size``, which must be
        a multiple of microbatch x data-parallel size (``configs.checks`` sees to it).
        """
        share, rest = divmod(global_batch_size, self._size)
        if rest or share % self._micro_batch_size:
            raise ValueError(
                f"a batch of {global_batch_size} is no multiple of {self._micro_batch_size} x {self._size} samples"
            )
        ids = self._mixture.sample_ids(consumed_samples + self._rank * share, share)
        return (tuple(ids[at : at + self._micro_batch_size]) for at in range(0, share, self._micro_batch_size))

    def read(
        self, samples: Sequence[SampleId], shape: StepShape, substitutes: Mapping[SampleId, SampleId] | None = None
    ) -> Batch:
        """The microbatch of these samples, cut as ``shape`` says; a sample with a substitute is that one instead.

        Raises DamagedSamples for all of them that cannot be read.
        """
        tokens = np.empty((len(samples), shape.pieces * shape.sequence_length + 1), np.int64)
        starts: list[NDArray[np.int64]] = []
        damaged: dict[SampleId, str] = {}
        for row, sample in zip(tokens, samples, strict=True):
            instead = substitutes.get(sample, sample) if substitutes else sample
            try:
                starts.append(self._mixture.read_into(row, instead, documents=self._documents))
            except Damage as damage:
                damaged[sample] = str(damage)
        if damaged:
            raise DamagedSamples(damaged)
        # Of whole windows, reshape alone would give views that skip a token at the end of each row.
        windows, sequences = torch.from_numpy(tokens), (len(samples) * shape.pieces, shape.sequence_length)
        return Batch(
            windows[:, :-1].reshape(sequences).contiguous(),
            windows[:, 1:].reshape(sequences).contiguous(),
            _document_start(starts, shape) if self._documents else None,
            tuple(samples),
        )


def _document_start(starts: list[NDArray[np.int64]], shape: StepShape) -> torch.Tensor:
    length = shape.pieces * shape.sequence_length
    whole = torch.from_numpy(np.stack([start_per_token(one, length) for one in starts]))
    first = torch.arange(shape.pieces).repeat(len(starts)) * shape.sequence_length
    return (whole.reshape(-1, shape.sequence_length) - first[:, None]).clamp_(min=0)
