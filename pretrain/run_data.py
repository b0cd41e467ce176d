"""The samples of a run: which tokens each step reads, on this rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..configs.schema import Config
from ..data_pipeline.dataset import TokenDataset
from ..data_pipeline.loader import Batch, BatchLoader, SampleOrder, SequentialOrder
from ..parallel.microbatch import Microbatch
from ..parallel.topology import Topology


class RunData:
    """Training and validation batches as pure functions of the number of consumed samples."""

    def __init__(self, config: Config, topology: Topology) -> None:
        self._batch_size = config.train.global_batch_size
        self._masks_documents = config.train.document_masking
        self._device = topology.device
        directory, length = config.data.directory, config.train.sequence_length
        training = TokenDataset(directory, "train", length)
        place = dict(
            micro_batch_size=config.train.micro_batch_size,
            data_parallel_rank=topology.data_rank,
            data_parallel_size=topology.layout.data,
        )
        self.training_samples = len(training)
        self._training = BatchLoader(training, SampleOrder(len(training), config.train.seed), **place)
        self._validation: BatchLoader | None = None
        if config.evaluation.interval:
            validation = TokenDataset(directory, "validation", length)
            self._validation = BatchLoader(validation, SequentialOrder(len(validation)), **place)

    def training(self, consumed_samples: int) -> Iterator[Microbatch]:
        """This rank's microbatches of the step that starts after ``consumed_samples``."""
        return self._on_device(self._training.microbatches(consumed_samples, self._batch_size))

    def validation(self, batches: int) -> Iterator[Microbatch]:
        """This rank's microbatches of the first ``batches`` global batches of the held-out split."""
        if self._validation is None:
            raise RuntimeError("the run has no validation split: evaluation.interval is 0")
        return self._on_device(self._validation.microbatches(0, batches * self._batch_size))

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """The data cursor for a checkpoint: JSON."""
        return self._training.state(consumed_samples)

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise UsageError where a checkpoint's cursor belongs to other data, another seed or another length."""
        self._training.check_state(state)

    def _on_device(self, batches: Iterator[Batch]) -> Iterator[Microbatch]:
        for batch in batches:
            yield Microbatch(
                self._moved(batch.tokens),
                self._moved(batch.labels),
                self._moved(batch.document_start) if self._masks_documents else None,
            )

    def _moved(self, ids: Tensor) -> Tensor:
        return ids.to(self._device, non_blocking=True)
