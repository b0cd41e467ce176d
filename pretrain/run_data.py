"""The data of a run: what each step reads on this rank, and the position from which a resumed run reads on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..configs.ramps import full_shape, shape_after
from ..configs.schema import Config
from ..data_pipeline.cursor import Cursor, Reading
from ..data_pipeline.damage import Replacement
from ..data_pipeline.loader import Batch
from ..data_pipeline.mixture import Mixture
from ..data_pipeline.opening import open_training, open_validation
from ..parallel.microbatch import Microbatch
from ..parallel.topology import Topology
from .journal import Journal, forget_after
from .sample_stream import SampleStream

logger = logging.getLogger(__name__)


class RunData:
    """Training and validation batches as pure functions of the number of consumed samples."""

    def __init__(self, config: Config, topology: Topology) -> None:
        self._config, self._topology = config, topology
        train = config.train
        sources = open_training(config.data, train.sequence_length, train.seed)
        if topology.rank == 0 and config.data.on_damage == "stop":
            # Thousands of ranks that look at thousands of files each would be a burden on any file system.
            for source in sources:
                source.dataset.check_files()
        self._cursor = Cursor(sources, Reading(train.seed, train.sequence_length, config.data.shuffle))
        self._training = self._stream(self._cursor.mixture)
        self._validation: SampleStream | None = None
        if config.evaluation.interval:
            held_out = Mixture(open_validation(config.data, train.sequence_length))
            whole = replace(full_shape(train), samples=config.evaluation.batches * train.global_batch_size)
            self._validation = SampleStream(held_out, config, topology, lambda _: whole, threads=0)
        self._record: Journal | None = None
        self._skipped: Journal | None = None

    def training(self, consumed_samples: int, step: int) -> Iterator[Microbatch]:
        """This rank's microbatches of step ``step``, which starts after ``consumed_samples``."""
        self._training.replaced = partial(self._log_replaced, step)
        batches = self._training.step(consumed_samples)
        return self._on_device(self._recorded(batches, consumed_samples, step))

    def validation(self) -> Iterator[Microbatch]:
        """This rank's microbatches of one evaluation: the first ``evaluation.batches`` of the held-out split."""
        if self._validation is None:
            raise RuntimeError("the run has no validation split: evaluation.interval is 0")
        return self._on_device(self._validation.step(0))

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """The data cursor for a checkpoint: JSON."""
        return self._cursor.state(consumed_samples) | {"skipped_samples": self.skipped_samples}

    def restore(self, state: dict[str, Any]) -> None:
        """Read on from a checkpoint's cursor.

        Raises UsageError where it belongs to other data and ``data.on_change`` is ``refuse``.
        """
        accepts = self._config.data.on_change == "accept"
        for change in self._cursor.restore(state, accept_changes=accepts):
            logger.warning("the data changed since the checkpoint, as data.on_change=accept allows: %s", change)
        self._training.close()
        self._training = self._stream(self._cursor.mixture)
        self._training.substitutes.found_before = int(state.get("skipped_samples", 0))

    def open_records(self, last_step: int) -> None:
        """Begin to log what is read and replaced, after ``last_step`` steps. Every rank must call it once."""
        directory, topology = self._config.run.directory, self._topology
        if topology.rank == 0 and self._config.data.on_damage == "skip":
            self._skipped = Journal(directory / "skipped.jsonl", last_step)
        if self._config.data.record_samples and topology.is_first_of_replica:
            self._record = self._open_record(directory / "samples", last_step)

    @property
    def skipped_samples(self) -> int:
        """Damaged samples that were replaced since the start of the run."""
        return self._training.substitutes.count

    @property
    def waited(self) -> float:
        """Seconds that steps have waited for data on this rank."""
        return self._training.waited

    def mixture_values(self, consumed_samples: int) -> dict[str, float]:
        """For each source the share of all samples that it has had so far, and how many epochs of it were read."""
        mixture = self._cursor.mixture
        read = mixture.samples_read(consumed_samples)
        values: dict[str, float] = {}
        for source, count in zip(mixture.sources, read, strict=True):
            values[f"data/mix/{source.name}"] = count / max(1, sum(read))
            values[f"data/epoch/{source.name}"] = count / len(source.dataset)
        return values

    def describe(self) -> str:
        """The sources in a few words, for the banner."""
        sources = self._cursor.mixture.sources
        whole = sum(source.weight for source in sources)
        parts = [
            f"{source.name} ({source.dataset.manifest.tokens('train'):,} tokens"
            + (f", {source.weight / whole:.2%} of the samples)" if len(sources) > 1 else ")")
            for source in sources
        ]
        order = {"windows": "windows shuffled", "blocks": "blocks of windows shuffled"}
        return f"{' + '.join(parts)}; {order[self._config.data.shuffle]}"

    def close(self) -> None:
        """End the threads that read ahead, and the logs."""
        self._training.close()
        for journal in (self._record, self._skipped):
            if journal is not None:
                journal.close()

    def _stream(self, mixture: Mixture) -> SampleStream:
        train = self._config.train
        return SampleStream(
            mixture, self._config, self._topology, partial(shape_after, train), threads=self._config.data.workers
        )

    def _open_record(self, directory: Path, last_step: int) -> Journal:
        rank, size = self._topology.data_rank, self._topology.layout.data
        # A run that had more data ranks left files that none of this run's ranks continues.
        for path in directory.glob("rank-*.jsonl"):
            if int(path.stem.removeprefix("rank-")) % size == rank:
                forget_after(path, last_step)
        return Journal(directory / f"rank-{rank:05d}.jsonl", last_step)

    def _recorded(self, batches: Iterator[Batch], consumed_samples: int, step: int) -> Iterator[Batch]:
        if self._record is None:
            yield from batches
            return
        names = [source.name for source in self._cursor.mixture.sources]
        for batch in batches:
            samples = [f"{names[sample.source]}:{sample.window}" for sample in batch.sample_ids]
            self._record.write({"step": step, "after_samples": consumed_samples, "samples": samples})
            yield batch

    def _log_replaced(self, step: int, replacements: list[Replacement]) -> None:
        for one in replacements:
            logger.warning("sample %d of %s was replaced: %s", one.sample, one.source, one.reason)
            if self._skipped is not None:
                self._skipped.write({"step": step, **one._asdict()})

    def _on_device(self, batches: Iterator[Batch]) -> Iterator[Microbatch]:
        for batch in batches:
            starts = batch.document_start
            yield Microbatch(
                self._moved(batch.tokens), self._moved(batch.labels), None if starts is None else self._moved(starts)
            )

    def _moved(self, ids: Tensor) -> Tensor:
        return ids.to(self._topology.device, non_blocking=True)
