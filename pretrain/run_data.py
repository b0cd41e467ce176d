"""The data of a run: what each step reads on this rank, and the position from which a resumed run reads on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..configs.errors import UsageError
from ..configs.ramps import full_shape, shape_after
from ..configs.schema import Config
from ..data_pipeline.cursor import Cursor, Reading
from ..data_pipeline.damage import Replacement
from ..data_pipeline.loader import Batch
from ..data_pipeline.mixture import Mixture, Source
from ..data_pipeline.opening import PreparedData
from ..data_pipeline.preparation.splits import TRAIN, VALIDATION
from ..parallel.agreement import from_first_rank, union_over_ranks
from ..parallel.microbatch import Microbatch
from ..parallel.topology import Topology
from .journal import Journal, forget_after
from .sample_stream import SampleStream

logger = logging.getLogger(__name__)


class RunData:
    """Training and validation batches as pure functions of the number of consumed samples."""

    def __init__(self, config: Config, topology: Topology, prepared: PreparedData) -> None:
        """Raises UsageError where a split is missing, too short, or not the same on every rank; RunError where shards
        are missing and ``data.on_damage`` is ``stop``."""
        self._config, self._topology = config, topology
        train = config.train
        sources = prepared.training(train.sequence_length, train.seed)
        held_out = prepared.validation(train.sequence_length) if config.evaluation.interval else []
        _check_same_data(prepared, topology)
        if topology.rank == 0 and config.data.on_damage == "stop":
            # Thousands of ranks that look at thousands of files each would be a burden on any file system.
            for source in (*sources, *held_out):
                source.dataset.check_files()
        self._cursor = Cursor(sources, Reading(train.seed, train.sequence_length, config.data.shuffle))
        self._training = self._stream(self._cursor.mixture)
        self._validation = self._held_out_stream(held_out) if held_out else None
        self._record: Journal | None = None
        self._skipped: Journal | None = None

    def training(self, consumed_samples: int, step: int) -> Iterator[Microbatch]:
        """This rank's microbatches of step ``step``, which starts after ``consumed_samples``."""
        self._training.replaced = partial(self._log_replaced, step, TRAIN)
        batches = self._training.step(consumed_samples)
        return self._on_device(self._recorded(batches, consumed_samples, step))

    def validation(self, step: int) -> Iterator[Microbatch]:
        """This rank's microbatches of the evaluation after ``step``: the first ``evaluation.batches`` of the held-out
        split."""
        if self._validation is None:
            raise RuntimeError("the run has no validation split: evaluation.interval is 0")
        self._validation.replaced = partial(self._log_replaced, step, VALIDATION)
        return self._on_device(self._validation.step(0))

    def names(self, consumed_samples: int, count: int) -> list[str]:
        """The training samples from a position on, as SOURCE:WINDOW, before damaged ones are replaced."""
        mixture = self._cursor.mixture
        ids = mixture.sample_ids(consumed_samples, count)
        return [f"{mixture.sources[sample.source].name}:{sample.window}" for sample in ids]

    def flush(self) -> None:
        """Bring what was recorded to the disk."""
        for journal in (self._record, self._skipped):
            if journal is not None:
                journal.flush()

    def go_back(self, step: int) -> None:
        """Forget what was recorded after ``step``, to which the run has gone back."""
        for journal in (self._record, self._skipped):
            if journal is not None:
                journal.forget_after(step)

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
        self._training.substitutes.found_before = int(state["skipped_samples"])

    def open_records(self, last_step: int) -> None:
        """Begin to log what is read and replaced, after ``last_step`` steps. Every rank must call it once."""
        directory, topology = self._config.run.directory, self._topology
        if topology.rank == 0 and self._config.data.on_damage == "skip":
            self._skipped = Journal(directory / "skipped.jsonl", last_step)
        if self._config.data.record_samples and topology.is_first_of_replica:
            self._record = self._open_record(directory / "samples", last_step)

    @property
    def skipped_samples(self) -> int:
        """Damaged training samples that were found and replaced since the start of the run."""
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

    def close(self, *, wait: bool = True) -> None:
        """End the threads that read ahead, and the logs; without ``wait`` threads end when they can."""
        self._training.close(wait=wait)
        for journal in (self._record, self._skipped):
            if journal is not None:
                journal.close()

    def _stream(self, mixture: Mixture) -> SampleStream:
        train = self._config.train
        return SampleStream(
            mixture, self._config, self._topology, partial(shape_after, train), threads=self._config.data.workers
        )

    def _held_out_stream(self, sources: list[Source]) -> SampleStream:
        train, batches = self._config.train, self._config.evaluation.batches
        whole = replace(full_shape(train), samples=batches * train.global_batch_size)
        return SampleStream(Mixture(sources), self._config, self._topology, lambda _: whole, threads=0)

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

    def _log_replaced(self, step: int, split: str, replacements: list[Replacement]) -> None:
        for one in replacements:
            logger.warning("sample %d of %s was replaced: %s", one.sample, one.source, one.reason)
            if self._skipped is not None:
                self._skipped.write({"step": step, "split": split, **one._asdict()})

    def _on_device(self, batches: Iterator[Batch]) -> Iterator[Microbatch]:
        for batch in batches:
            starts = batch.document_start
            yield Microbatch(
                self._moved(batch.tokens), self._moved(batch.labels), None if starts is None else self._moved(starts)
            )

    def _moved(self, ids: Tensor) -> Tensor:
        return ids.to(self._topology.device, non_blocking=True)


def _check_same_data(prepared: PreparedData, topology: Topology) -> None:
    """Raise UsageError on every rank unless all have the same: a node may hold an old copy of a folder."""
    own = [manifest.fingerprint for manifest in prepared.manifests]
    first = from_first_rank(own, topology)
    others = union_over_ranks({topology.rank: own} if own != first else {}, topology)
    for rank, fingerprints in others.items():
        differing = [n for n, pair in enumerate(zip(first, fingerprints, strict=True)) if pair[0] != pair[1]]
        place, number = prepared.data.mixture[differing[0]].directory, differing[0]
        raise UsageError(
            f"rank {rank} reads other data in {place} (fingerprint {fingerprints[number][:16]}) than rank 0 "
            f"({first[number][:16]}): give every node the same copy"
        )
