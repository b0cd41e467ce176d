"""Whether the parts of a run's data, and the ramps over them, fit together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from .errors import UsageError
from .locations import check_location, is_remote
from .schema import Data, RampStage, Train


def check_data(data: Data) -> None:
    """Raise UsageError, in one sentence, unless there is one folder or one mixture, at places that are read."""
    if (data.directory is None) == (not data.sources):
        state = "both are given" if data.sources else "neither is given"
        raise UsageError(
            f"the data are either one folder (data.directory) or a mixture (data.sources), and {state}: "
            "give one of them"
        )
    if data.directory is not None:
        check_location("data.directory", data.directory)
    for number, source in enumerate(data.sources):
        check_location(f"data.sources.{number}.directory", source.directory)
    _check_distinct(data)
    if data.cache is not None and not any(is_remote(source.directory) for source in data.mixture):
        raise UsageError(
            f"data.cache={data.cache} keeps parts of remote data, and all data of this run are local: leave it out"
        )


def check_ramps(train: Train) -> None:
    """Raise UsageError, in one sentence, unless the stages follow each other and lengths divide the windows.

    Whether batches and lengths can be divided over the ranks is checked where the final ones are.
    """
    _check_order("train.batch_ramp", train.batch_ramp)
    _check_order("train.sequence_ramp", train.sequence_ramp)
    for number, stage in enumerate(train.sequence_ramp):
        if train.sequence_length % stage.sequence_length:
            raise UsageError(
                f"train.sequence_ramp.{number}.sequence_length={stage.sequence_length} does not divide "
                f"train.sequence_length={train.sequence_length}, whose windows are cut into sequences of that length: "
                "use a divisor of it"
            )


def _check_order(name: str, ramp: Sequence[RampStage]) -> None:
    for number, (before, stage) in enumerate(pairwise(ramp), start=1):
        if stage.until_samples <= before.until_samples:
            raise UsageError(
                f"{name}.{number}.until_samples={stage.until_samples} does not come after the "
                f"{before.until_samples} of the stage before it: put the stages in their order"
            )


def _check_distinct(data: Data) -> None:
    seen: dict[str, int] = {}
    for number, source in enumerate(data.sources):
        place = source.directory.rstrip("/")
        if place in seen:
            raise UsageError(
                f"data.sources.{number}.directory={source.directory} is the same as data.sources.{seen[place]}: "
                "give each source once, with the sum of the weights"
            )
        seen[place] = number
