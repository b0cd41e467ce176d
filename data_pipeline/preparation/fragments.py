"""The record of a finished chunk. Written after the chunk's shards, it means: these need not be made again."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import file_digest
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from ...configs.errors import RunError
from ..durable import write_durably
from ..shards.manifest import Sha256, ShardRecord
from ..shards.member_index import index_name
from .splits import Scores

FRAGMENTS = "chunks"
"""The folder of the records, inside that of the prepared data. It goes when the manifest has been written."""


class Fragment(BaseModel):
    """What became of a chunk."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    preparation: Sha256
    """Identity of request, inputs and tokenizer: the record of another preparation counts for nothing."""
    chunk: NonNegativeInt
    splits: dict[str, tuple[ShardRecord, ...]]
    """Shards of every split that has documents of the chunk, in the order of their tokens."""
    documents: NonNegativeInt
    tokens: NonNegativeInt
    lowest_score: float
    """The lowest ``splits.holdout_score`` of its documents, 1 without any."""

    @property
    def scores(self) -> Scores:
        """What its documents mean for the splits."""
        return Scores(self.documents, self.lowest_score, frozenset(self.splits))

    def records(self) -> list[ShardRecord]:
        """The shards of all splits."""
        return [record for records in self.splits.values() for record in records]


def fragment_path(output: Path, chunk: int) -> Path:
    """Where the record of a chunk lies."""
    return output / FRAGMENTS / f"{chunk:05d}.json"


def write_fragment(output: Path, fragment: Fragment) -> None:
    """Commit a chunk: its shards must already be on disk."""
    write_durably(fragment_path(output, fragment.chunk), fragment.model_dump_json().encode("ascii"))


def read_fragments(output: Path, preparation: str) -> dict[int, Fragment]:
    """The records, by chunk, that a preparation of that identity has left in ``output``; others are passed over."""
    fragments: dict[int, Fragment] = {}
    for path in sorted((output / FRAGMENTS).glob("*.json")):
        try:
            fragment = Fragment.model_validate_json(path.read_bytes())
        except ValidationError:
            continue  # damaged: the chunk is prepared again
        if fragment.preparation == preparation and path == fragment_path(output, fragment.chunk):
            fragments[fragment.chunk] = fragment
    return fragments


def is_whole(output: Path, fragment: Fragment) -> bool:
    """Whether all shards of a chunk, and their indexes, are what was written."""
    return all(_shard_is_whole(output / record.name, record) for record in fragment.records())


def check_present(output: Path, fragments: Iterable[Fragment]) -> None:
    """Raise RunError unless every shard is there with its size, and beside it its index."""
    for fragment in fragments:
        for record in fragment.records():
            shard = output / record.name
            index = shard.with_name(index_name(shard.name))
            lost = shard if _size(shard) != record.bytes else index if not _size(index) else None
            if lost is not None:
                raise RunError(
                    f"{output} has lost {lost.name}, which this preparation had written, perhaps to another process "
                    "that works there; once none does, the same command makes it again"
                )


def _size(path: Path) -> int:
    """The size of a file, 0 for one that is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _shard_is_whole(path: Path, record: ShardRecord) -> bool:
    try:
        return (
            path.stat().st_size == record.bytes
            and _sha256(path.with_name(index_name(path.name))) == record.index_sha256
            and _sha256(path) == record.sha256
        )
    except OSError:
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
