"""Batches as a pure function of the number of consumed samples, whatever the data-parallel size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..configs.errors import UsageError
from .dataset import TokenDataset
from .permutation import Permutation

STATE_FORMAT = 1


class Order(Protocol):
    """The endless sequence of sample ids that a run consumes."""

    @property
    def seed(self) -> int | None:
        """What the order depends on beside the size of the dataset, if anything."""

    def sample_ids(self, start: int, count: int) -> NDArray[np.int64]:
        """(count,): ids of the consumed samples ``start`` .. ``start + count - 1``."""


class SampleOrder:
    """Every epoch visits each sample once, in an order of its own that ``seed`` decides."""

    def __init__(self, dataset_size: int, seed: int) -> None:
        self._size = dataset_size
        self.seed = seed

    def sample_ids(self, start: int, count: int) -> NDArray[np.int64]:
        """(count,): consumed sample i is element i % size of the permutation of epoch i // size."""
        stop = start + count
        epochs = range(start // self._size, -(-stop // self._size))
        return np.concatenate([np.empty(0, np.int64), *(self._epoch(epoch, start, stop) for epoch in epochs)])

    def _epoch(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """The part of an epoch that lies in the consumed samples [start, stop)."""
        first = epoch * self._size
        inside = np.arange(max(start - first, 0), min(stop - first, self._size), dtype=np.int64)
        return Permutation(self._size, (self.seed, epoch))(inside)


class SequentialOrder:
    """The samples as they lie, again and again: the same ones for every evaluation."""

    seed: int | None = None

    def __init__(self, dataset_size: int) -> None:
        self._size = dataset_size

    def sample_ids(self, start: int, count: int) -> NDArray[np.int64]:
        """(count,): consumed sample i is sample i % size."""
        return np.arange(start, start + count, dtype=np.int64) % self._size


@dataclass(frozen=True, slots=True)
class Batch:
    """One microbatch of b samples of S tokens."""

    tokens: torch.Tensor
    """(b, S) int64."""
    labels: torch.Tensor
    """(b, S) int64: the token that follows each of ``tokens``."""
    document_start: torch.Tensor
    """(b, S) int64: the position in the window of the first token of each token's document, 0 where the document
    began before the window."""
    sample_ids: NDArray[np.int64]
    """(b,): which samples these are, for logs and tests."""


class BatchLoader:
    """The microbatches of one data-parallel rank.

    Holds no position: the caller counts consumed samples, over all ranks, and that number is the only cursor.
    So a run may continue with another data-parallel size, microbatch or global batch and reads on exactly
    where it was.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        order: Order,
        *,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(
                f"rank {data_parallel_rank} is outside the data-parallel size {data_parallel_size}"
            )
        self._dataset = dataset
        self._order = order
        self._micro_batch_size = micro_batch_size
        self._rank = data_parallel_rank
        self._size = data_parallel_size

    def microbatches(self, consumed_samples: int, global_batch_size: int) -> Iterator[Batch]:
        """This rank's microbatches of the step that follows ``consumed_samples``, in order.

        Rank r has samples [r * B / size, (r + 1) * B / size) of the step's B = ``global_batch_size``. Raises
        UsageError when B is not a multiple of microbatch and data-parallel size.
        """
        unit = self._micro_batch_size * self._size
        if global_batch_size < 1 or global_batch_size % unit:
            raise UsageError(
                f"global_batch_size={global_batch_size} is not a multiple of {unit} (micro_batch_size "
                f"{self._micro_batch_size} x data-parallel size {self._size}); choose one that is"
            )
        share = global_batch_size // self._size
        ids = self._order.sample_ids(consumed_samples + self._rank * share, share)
        return (self._batch(part) for part in ids.reshape(-1, self._micro_batch_size))

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """What a checkpoint must hold to read on after ``consumed_samples``, as JSON values."""
        return {
            "format": STATE_FORMAT,
            "fingerprint": self._dataset.fingerprint,
            "seed": self._order.seed,
            "sequence_length": self._dataset.sequence_length,
            "consumed_samples": consumed_samples,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise UsageError, saying what changed, unless ``state`` is of this sequence of samples."""
        expected = self.state(0)
        missing = sorted(expected.keys() - state.keys())
        if missing:
            raise UsageError(
                f"the checkpoint's data position lacks {' and '.join(missing)}; "
                "resume from a checkpoint that is whole"
            )
        for name, meaning in _IDENTITY.items():
            if state[name] != expected[name]:
                raise UsageError(
                    f"the checkpoint was made with {meaning} {state[name]} and this run has "
                    f"{expected[name]}, so its data position means nothing here; "
                    "resume with the former, or begin a new run"
                )

    def _batch(self, ids: NDArray[np.int64]) -> Batch:
        samples = [self._dataset[int(index)] for index in ids]
        windows = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
        starts = torch.from_numpy(np.stack([sample.document_start_per_token() for sample in samples]))
        return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), starts, ids)


_IDENTITY = {
    "format": "data position format",
    "fingerprint": "data of the fingerprint",
    "seed": "seed",
    "sequence_length": "sequence length",
}
"""What fixes the sequence of samples, and how a message calls it."""
