"""Which ranks hang, by what each of them has told, and the sentence about it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass

from .pulse import ALONE, COURSE

_NAMED = 8
"""Ranks that a sentence names one by one."""


@dataclass(frozen=True)
class Record:
    """What a rank tells the others about its main thread. Its seconds are by its own clock."""

    host: str
    phase: str
    step: int
    turn: int
    """How many steps it has begun: equal on all ranks of a step, and greater in each later one."""
    finished: int
    seconds: float
    """For how long it has not moved."""
    overdue: bool
    """Whether that is longer than its phase may last."""
    beat: int
    """Counts what the rank has told: a rank whose count stands still is stopped, dead or cut off."""
    ended: bool = False
    """Whether its part in the run is over."""

    def encode(self) -> str:
        """The record as JSON."""
        return json.dumps(astuple(self))

    @classmethod
    def decode(cls, data: bytes) -> Record:
        """The inverse of ``encode``."""
        return cls(*json.loads(data))


def verdict(records: Mapping[int, Record], silent: Sequence[int], world_size: int) -> str | None:
    """The sentence about the ranks that the others wait for; None where those may still move.

    Args:
        records: the newest record of each rank that has told anything.
        silent: the ranks that tell nothing, or nothing any more.
    """
    if silent:
        return _missing(silent, records, ("does not answer", "do not answer"), " (stopped, dead or cut off)")
    if ended := [rank for rank, record in records.items() if record.ended]:
        return _missing(ended, records, ("has ended", "have ended"), " while others wait")
    blamed = _blamed(records)
    return _hanging(blamed, records, world_size) if blamed else None


def lost_store(place: str, rank: int, record: Record) -> str:
    """The sentence of a rank that hangs and can ask nobody, because the store at ``place`` does not answer."""
    return (
        f"the host of rank 0 does not answer, nor does the run's store there, {place} (stopped, dead or cut off); "
        f"{_rank_at(rank, record.host)} waits in {_stands(record)}; last step that it finished: {_step(record)}"
    )


def _blamed(records: Mapping[int, Record]) -> list[int]:
    """Those that wait for nobody and do not move; else those behind all others, if none of them moves."""
    if alone := {rank: r for rank, r in records.items() if r.overdue and r.phase in ALONE}:
        return _behind(alone)
    behind = _behind(records)
    return behind if all(records[rank].overdue for rank in behind) else []


def _behind(records: Mapping[int, Record]) -> list[int]:
    places = {rank: (r.turn, r.phase not in ALONE, _place_in_step(r.phase)) for rank, r in records.items()}
    first = min(places.values())
    return sorted(rank for rank, place in places.items() if place == first)


def _place_in_step(phase: str) -> int:
    return COURSE.index(phase) if phase in COURSE else len(COURSE)


def _hanging(blamed: Sequence[int], records: Mapping[int, Record], world_size: int) -> str:
    longest = max((records[rank] for rank in blamed), key=lambda record: record.seconds)
    if world_size == 1:
        where = f"{_rank_at(0, longest.host)} hangs: in {_stands(longest)}"
        return f"{where}; last step that it finished: {_step(longest)}"
    end = f"; last step that all ranks finished: {_finished(records)}"
    others = [record.phase for rank, record in records.items() if rank not in blamed]
    if not others:
        return f"all {world_size} ranks hang: in {_stands(longest)}, and none is behind the others{end}"
    who, verb = _who(blamed, records), "hangs" if len(blamed) == 1 else "hang"
    awaited = "it" if len(blamed) == 1 else "them"
    return f"{who} {verb}: in {_stands(longest)}, while the others wait for {awaited} in {_phases(others)}{end}"


def _missing(ranks: Sequence[int], records: Mapping[int, Record], verbs: tuple[str, str], why: str) -> str:
    ranks = sorted(ranks)
    seen = [records[rank] for rank in ranks if rank in records]
    one = len(ranks) == 1
    told = f"{_who(ranks, records)} {verbs[not one]}{why}; {'it was' if one else 'they were'} "
    if not seen:
        return told + f"never seen by the others; last step that all those finished: {_finished(records)}"
    last = min(seen, key=lambda record: (record.turn, _place_in_step(record.phase)))
    return told + f"last seen in {_where(last)}; last step that all ranks finished: {_finished(records)}"


def _who(ranks: Sequence[int], records: Mapping[int, Record]) -> str:
    hosts = list(dict.fromkeys(records[rank].host for rank in ranks if rank in records))
    if len(ranks) == 1:
        return _rank_at(ranks[0], hosts[0] if hosts else None)
    place = f" on host{'s' if len(hosts) > 1 else ''} {_listed(hosts)}" if hosts else ""
    return f"ranks {_listed(ranks)}{place}"


def _rank_at(rank: int, host: str | None) -> str:
    return f"rank {rank} on host {host}" if host else f"rank {rank}"


def _listed(things: Sequence[object]) -> str:
    shown = [str(thing) for thing in things[:_NAMED]]
    if len(things) > _NAMED:
        return f"{', '.join(shown)} and {len(things) - _NAMED} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def _phases(phases: Iterable[str]) -> str:
    return _listed([f"'{phase}'" for phase in dict.fromkeys(phases)])


def _where(record: Record) -> str:
    return f"phase '{record.phase}' of step {record.step}"


def _stands(record: Record) -> str:
    return f"{_where(record)} for {record.seconds:.0f} s"


def _step(record: Record) -> str:
    return str(record.finished) if record.finished else "none"


def _finished(records: Mapping[int, Record]) -> str:
    return _step(min(records.values(), key=lambda record: record.finished)) if records else "unknown"
