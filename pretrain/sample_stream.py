"""The samples of one split as this rank's microbatches, read ahead and, where asked for, mended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from ..configs.errors import RunError
from ..configs.ramps import StepShape
from ..configs.schema import Config
from ..data_pipeline.damage import Replacement, Substitutes
from ..data_pipeline.loader import Batch, BatchLoader, DamagedSamples
from ..data_pipeline.mixture import Mixture, SampleId
from ..data_pipeline.read_ahead import Job, ReadAhead
from ..parallel.agreement import union_over_ranks
from ..parallel.topology import Topology


class SampleStream:
    """Microbatches as a function of the number of consumed samples.

    Under ``data.on_damage=skip`` a step begins when all its samples have been read on all ranks and the ranks agree on
    which are damaged: those are replaced, and the replacements are handed to ``replaced``.
    """

    def __init__(
        self,
        mixture: Mixture,
        config: Config,
        topology: Topology,
        shape_after: Callable[[int], StepShape],
        *,
        threads: int,
    ) -> None:
        self._topology, self._shape_after = topology, shape_after
        self._loader = BatchLoader(
            mixture,
            micro_batch_size=config.train.micro_batch_size,
            data_parallel_rank=topology.data_rank,
            data_parallel_size=topology.layout.data,
            documents=config.train.document_masking,
        )
        self._skips = config.data.on_damage == "skip"
        self.substitutes = Substitutes(mixture, config.data.damage_budget)
        self.replaced: Callable[[list[Replacement]], None] = lambda _: None
        # A step that begins when all of it has been read wants all of it to be read ahead.
        whole_step = topology.layout.num_microbatches if self._skips else 1
        depth = max(config.data.read_ahead, whole_step)
        self._ahead = ReadAhead(self._jobs, self._next_position, threads, depth)

    @property
    def waited(self) -> float:
        """Seconds that steps have waited for data on this rank."""
        return self._ahead.waited

    def step(self, consumed_samples: int) -> Iterator[Batch]:
        """This rank's microbatches of the step that follows ``consumed_samples``.

        Raises RunError for a damaged sample, or under ``skip`` for one too many.
        """
        plan = self._plan(consumed_samples)
        calls = self._ahead.step(consumed_samples, len(plan))
        if self._skips:
            return iter(self._agreed(plan, self._shape_after(consumed_samples), [_outcome(call) for call in calls]))
        return (_whole(_outcome(call)) for call in calls)

    def close(self, *, wait: bool = True) -> None:
        """End the threads, or let them end without waiting for it."""
        self._ahead.close(wait=wait)

    def _plan(self, consumed_samples: int) -> list[tuple[SampleId, ...]]:
        return list(self._loader.plan(consumed_samples, self._shape_after(consumed_samples).samples))

    def _jobs(self, consumed_samples: int) -> Iterator[Job[Batch]]:
        shape = self._shape_after(consumed_samples)
        return (self._job(samples, shape) for samples in self._plan(consumed_samples))

    def _job(self, samples: tuple[SampleId, ...], shape: StepShape) -> Job[Batch]:
        return partial(self._loader.read, samples, shape, self.substitutes.table)

    def _next_position(self, consumed_samples: int) -> int:
        return consumed_samples + self._shape_after(consumed_samples).samples

    def _agreed(
        self, plan: list[tuple[SampleId, ...]], shape: StepShape, outcomes: list[Batch | DamagedSamples]
    ) -> list[Batch]:
        replaced: dict[tuple[str, int], Replacement] = {}
        while found := union_over_ranks(_damage_in(outcomes), self._topology):
            for one in self.substitutes.replace(found):
                # A substitute may be damaged as well: what is told is the first reason and the last substitute.
                first = replaced.setdefault((one.source, one.sample), one)
                replaced[one.source, one.sample] = first._replace(replaced_by=one.replaced_by)
            # What was read ahead without these substitutes would report the same samples again.
            self._ahead.forget()
            for number, samples in enumerate(plan):
                if not found.keys().isdisjoint(samples):
                    outcomes[number] = _outcome(self._job(samples, shape))
        if replaced:
            self.replaced(list(replaced.values()))
        return [_whole(outcome) for outcome in outcomes]


def _outcome(job: Job[Batch]) -> Batch | DamagedSamples:
    try:
        return job()
    except DamagedSamples as damaged:
        return damaged


def _damage_in(outcomes: list[Batch | DamagedSamples]) -> dict[SampleId, str]:
    found: dict[SampleId, str] = {}
    for outcome in outcomes:
        if isinstance(outcome, DamagedSamples):
            found |= outcome.found
    return found


def _whole(outcome: Batch | DamagedSamples) -> Batch:
    if isinstance(outcome, DamagedSamples):
        reason = next(iter(outcome.found.values()))
        raise RunError(f"{reason}; or train on with data.on_damage=skip, which replaces damaged samples by others")
    return outcome
