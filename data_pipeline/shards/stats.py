"""Statistics of prepared data: how many documents and tokens there are, and how long the documents are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ...configs.errors import RunError
from .layout import read_index
from .manifest import Manifest, ShardRecord, load_manifest, token_dtype
from .member_index import LENGTH, Member, index_name

Progress = Callable[[int, int], None]
"""Called with the number of shards whose document lengths have been read, and that of all shards."""

_BATCH = 1024
"""Members counted at once: sorting what is held already costs more than one member does."""

_REMEDY = "'trine data verify' lists all the damage"


@dataclass(frozen=True, slots=True)
class Bucket:
    """The documents of a range of lengths."""

    first: int
    last: int
    """The range in tokens, both ends included: from a power of two to below the next one."""
    documents: int
    tokens: int


class LengthCounts:
    """How many documents there are of every length. Lengths are in tokens, with the token that ends a document."""

    def __init__(self, lengths: Iterable[NDArray[np.int64]]) -> None:
        self._lengths, self._counts = np.empty(0, np.int64), np.empty(0, np.int64)
        for batch in _batches(lengths):
            self._add(*np.unique(batch, return_counts=True))
        self._below = np.cumsum(self._counts)
        self.documents = int(self._counts.sum())
        self.tokens = int(self._lengths @ self._counts)

    @property
    def mean(self) -> float:
        """Tokens per document."""
        return self.tokens / self.documents

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self._lengths[-1])

    def quantile(self, share: float) -> int:
        """The smallest length that at least ``share`` of the documents, in (0, 1], do not exceed."""
        return int(self._lengths[np.searchsorted(self._below, share * self.documents)])

    def share_fitting(self, length: int) -> float:
        """The share of the documents of at most ``length`` tokens."""
        return int(self._counts[self._lengths <= length].sum()) / self.documents

    def histogram(self) -> tuple[Bucket, ...]:
        """The documents in ranges between powers of two, from that of the shortest to that of the longest."""
        # frexp gives the exponent exactly, where a logarithm may round up to the next one.
        powers = np.frexp(self._lengths)[1] - 1
        return tuple(self._bucket(power, powers == power) for power in range(powers[0], powers[-1] + 1))

    def _bucket(self, power: int, inside: NDArray[np.bool_]) -> Bucket:
        lengths, counts = self._lengths[inside], self._counts[inside]
        return Bucket(1 << power, (2 << power) - 1, int(counts.sum()), int(lengths @ counts))

    def _add(self, lengths: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        merged, places = np.unique(np.concatenate([self._lengths, lengths]), return_inverse=True)
        sums = np.zeros(merged.size, np.int64)
        np.add.at(sums, places, np.concatenate([self._counts, counts]))
        self._lengths, self._counts = merged, sums


@dataclass(frozen=True, slots=True)
class SplitStats:
    """One split."""

    shards: int
    bytes: int
    """Of the shards; their indexes are not counted."""
    lengths: LengthCounts


@dataclass(frozen=True, slots=True)
class Stats:
    """A folder of prepared data."""

    manifest: Manifest
    splits: dict[str, SplitStats]


def read_stats(directory: Path, *, progress: Progress | None = None) -> Stats:
    """The statistics of a folder of prepared data.

    Reads the indexes and document lengths of all shards, and no tokens. Memory grows with the number of different
    lengths, and not with that of documents. Raises UsageError for a folder without prepared data, RunError where the
    manifest, an index or a document length is damaged.
    """
    manifest = load_manifest(directory)
    token_bytes = token_dtype(manifest.dtype).itemsize
    total = sum(map(len, manifest.splits.values()))
    done = 0
    splits: dict[str, SplitStats] = {}

    def shards_of(records: Sequence[ShardRecord]) -> Iterator[NDArray[np.int64]]:
        nonlocal done
        for record in records:
            yield from _piece_lengths(directory / record.name, record, token_bytes)
            done += 1
            if progress is not None:
                progress(done, total)

    for split, records in manifest.splits.items():
        lengths = LengthCounts(join_pieces(shards_of(records)))
        splits[split] = SplitStats(len(records), sum(record.bytes for record in records), lengths)
    return Stats(manifest, splits)


def join_pieces(members: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    """The lengths of whole documents, from those of the pieces that the members of a split list, in order.

    ``Member`` says how a document is divided over members.
    """
    open_length = 0
    for pieces in members:
        if pieces[0] == 0:
            lengths = pieces[1:].copy()
            lengths[0] += open_length
        else:
            lengths = np.concatenate([[open_length], pieces]) if open_length else pieces
        # Only the next member tells whether the last document has ended.
        yield lengths[:-1]
        open_length = int(lengths[-1])
    if open_length:
        yield np.array([open_length], np.int64)


def _batches(lengths: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    held: list[NDArray[np.int64]] = []
    for part in lengths:
        held.append(part)
        if len(held) == _BATCH:
            yield np.concatenate(held)
            held = []
    if held:
        yield np.concatenate(held)


def _piece_lengths(path: Path, record: ShardRecord, token_bytes: int) -> Iterator[NDArray[np.int64]]:
    """What the members of a shard list as the lengths of their pieces."""
    index = _read_index(path.with_name(index_name(path.name)), record, token_bytes)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.bytes:
                raise RunError(f"shard {path} has {size} bytes and the manifest says {record.bytes}; {_REMEDY}")
            for row in index.tolist():
                member = Member(*row)
                data = os.pread(file.fileno(), LENGTH.itemsize * member.lengths, member.lengths_offset)
                pieces = np.frombuffer(data, LENGTH).astype(np.int64)
                if crc32(data) != member.lengths_crc32 or pieces.sum() != member.tokens or not pieces[1:].all():
                    raise RunError(f"shard {path} is damaged at byte {member.lengths_offset}; {_REMEDY}")
                yield pieces
    except OSError as error:
        raise RunError(f"shard {path} cannot be read ({error.strerror}); {_REMEDY}") from error


def _read_index(path: Path, record: ShardRecord, token_bytes: int) -> NDArray[np.int64]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"index {path} cannot be read ({error.strerror}); {_REMEDY}") from error
    if sha256(data).hexdigest() != record.index_sha256:
        raise RunError(f"index {path} is damaged; {_REMEDY}")
    try:
        return read_index(data, record, token_bytes)
    except ValueError as error:
        raise RunError(f"index {path} is not that of its shard ({error}); {_REMEDY}") from error
