"""Where a run stands in its data: what a checkpoint keeps of it, and whether another run may go on from there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..configs.errors import UsageError
from .mixture import Mixture, Shares, Source

FORMAT = 2
_DIGITS = 16
"""Hexadecimal digits of a hash that are kept: enough to tell data apart, and the cursor stays small."""


@dataclass(frozen=True)
class Reading:
    """What fixes the sequence of samples, beside the sources."""

    seed: int
    sequence_length: int
    shuffle: str


class Cursor:
    """The mixture of a run, and its position as JSON values.

    The only position is the number of consumed samples: nothing in it depends on how many ranks, threads or
    microbatches read them.
    """

    def __init__(self, sources: Sequence[Source], reading: Reading) -> None:
        self._reading = reading
        self.mixture = Mixture(sources)
        self._left: dict[str, int] = {}
        """Samples read of sources that are no longer in the mixture and may come back."""

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """The position after ``consumed_samples``: some 250 bytes, and 90 more for each source."""
        mixture = self.mixture
        read = mixture.samples_read(consumed_samples)
        return {
            "format": FORMAT,
            "consumed_samples": consumed_samples,
            "seed": self._reading.seed,
            "sequence_length": self._reading.sequence_length,
            "shuffle": self._reading.shuffle,
            "tokenizer": mixture.sources[0].dataset.manifest.tokenizer_sha256[:_DIGITS],
            "mixed_since": mixture.start,
            "sources": [
                {"name": s.name, "fingerprint": _identity(s), "weight": s.weight, "read": count}
                for s, count in zip(mixture.sources, read, strict=True)
            ],
            "left": self._left,
        }

    def restore(self, state: dict[str, Any], *, accept_changes: bool) -> list[str]:
        """Go on from ``state``, and say what changed since.

        Under ``accept_changes`` a changed mixture begins at the position of ``state``, and each source that was there
        at any time before reads on where it stood. Raises UsageError, saying what changed, where changes are not
        accepted or cannot be: another tokenizer gives the ids another meaning.
        """
        _check_whole(state, self.state(0))
        changes = self._changes(state)
        if changes and not accept_changes:
            raise UsageError(
                f"the data of this run are not those of its checkpoint: {'; '.join(changes)}. Resume with what it had, "
                "begin a new run in another run.directory, or accept the change with data.on_change=accept"
            )
        self._left = dict(state["left"])
        self.mixture = self._changed(state) if changes else self._same(state)
        return changes

    def _same(self, state: dict[str, Any]) -> Mixture:
        start, sources = int(state["mixed_since"]), self.mixture.sources
        since = Mixture(sources, start).samples_read(int(state["consumed_samples"]))
        before = [int(saved["read"]) - count for saved, count in zip(state["sources"], since, strict=True)]
        return Mixture(sources, start, before)

    def _changed(self, state: dict[str, Any]) -> Mixture:
        # Windows of another length are other windows; the part of an epoch that was read stays about the same.
        before, now = int(state["sequence_length"]), self._reading.sequence_length
        counts = self._left | {saved["fingerprint"]: int(saved["read"]) for saved in state["sources"]}
        read = {fingerprint: count * before // now for fingerprint, count in counts.items()}
        sources = self.mixture.sources
        start = [read.pop(_identity(source), 0) for source in sources]
        self._left = read
        return Mixture(sources, int(state["consumed_samples"]), start)

    def _changes(self, state: dict[str, Any]) -> list[str]:
        now = self.state(0)
        changes = [
            f"{meaning} was {state[name]} and is {now[name]}"
            for name, meaning in _READING.items()
            if state[name] != now[name]
        ]
        return changes + _source_changes(state["sources"], now["sources"])


_READING = {"seed": "train.seed", "sequence_length": "train.sequence_length", "shuffle": "data.shuffle"}


def _identity(source: Source) -> str:
    return source.dataset.fingerprint[:_DIGITS]


def _check_whole(state: dict[str, Any], expected: dict[str, Any]) -> None:
    if state.get("format") != FORMAT:
        raise UsageError(
            f"the checkpoint's data position has format {state.get('format')} and this version of trine reads "
            f"format {FORMAT}: resume with the version that wrote it"
        )
    missing = sorted(expected.keys() - state.keys())
    if missing:
        raise UsageError(
            f"the checkpoint's data position lacks {' and '.join(missing)}: resume from a checkpoint that is whole"
        )
    if state["tokenizer"] != expected["tokenizer"]:
        raise UsageError(
            f"the checkpoint was trained on data of the tokenizer {state['tokenizer']} and this run's data are of "
            f"{expected['tokenizer']}, whose token ids mean something else: prepare the data with the former"
        )


def _source_changes(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    old = {source["fingerprint"]: source for source in before}
    new = {source["fingerprint"]: source for source in now}
    gone = [f"{s['name']} (fingerprint {f}) is gone" for f, s in old.items() if f not in new]
    come = [f"{s['name']} (fingerprint {f}) is new" for f, s in new.items() if f not in old]
    if gone or come:
        return [*gone, *come]
    if list(old) != list(new):
        return [f"the sources were in the order {', '.join(s['name'] for s in before)}"]
    # What counts is the share of each source, not the number that was written.
    if Shares([s["weight"] for s in before]).slots == Shares([s["weight"] for s in now]).slots:
        return []
    return [f"the weights were {_shares(before)} and are {_shares(now)}"]


def _shares(sources: list[dict[str, Any]]) -> str:
    whole = math.fsum(source["weight"] for source in sources)
    return ", ".join(f"{source['name']} {source['weight'] / whole:.4g}" for source in sources)
