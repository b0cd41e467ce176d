"""One shard and its index against the manifest: whether they are what was written and, if not, from which byte on.

A shard is a function of its payloads, and the index knows their checksums: so what differs can be named to the
payload, tar header or padding that holds it.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from io import BufferedReader
from pathlib import Path

import numpy as np

from .contents import ContentCheck
from .layout import Region, end_region, member_regions, misplaced, rebuild_index
from .manifest import MANIFEST, Manifest, ShardRecord, token_dtype
from .member_index import Member, index_name, parse_index
from .problem import Problem

_BLOCK = 1 << 20


class ShardVerifier:
    """Compares the shards of ``directory`` and their indexes with the manifest; several threads may share it."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self._manifest = manifest
        records = [record for records in manifest.splits.values() for record in records]
        self._owners = {record.sha256: record.name for record in records}
        self._owners |= {record.index_sha256: index_name(record.name) for record in records}

    def check(self, record: ShardRecord) -> list[Problem]:
        """Everything that is wrong with a shard and its index.

        Reads the shard once, a member at a time; a second time if its index is damaged.
        """
        return _ShardCheck(self._directory, record, self._manifest, self._owners).problems()


class _ShardCheck:
    def __init__(self, directory: Path, record: ShardRecord, manifest: Manifest, owners: Mapping[str, str]) -> None:
        self._path = directory / record.name
        self._index_path = directory / index_name(record.name)
        self._record = record
        self._manifest = manifest
        self._owners = owners
        self._token_bytes = token_dtype(manifest.dtype).itemsize
        self._found: list[Problem] = []

    def problems(self) -> list[Problem]:
        index = self._read_index()
        # What the index must be: the file if the manifest vouches for it, else what the shard says.
        wanted = index if self._is_index(index) else self._rebuilt_index()
        members = self._members(wanted)
        reading = self._read_shard(members)
        if index is not None and not self._is_index(index):
            if index == wanted and not self._is_known(reading):
                return [self._foreign_pair()]
            self._found.append(self._index_problem(index, wanted, reading))
        if reading.is_whole:
            self._found.extend(self._shard_problems(reading, members if self._is_index(wanted) else []))
        return self._found

    def _is_index(self, data: bytes | None) -> bool:
        return data is not None and sha256(data).hexdigest() == self._record.index_sha256

    def _is_shard(self, reading: _Reading) -> bool:
        return reading.sha256 == self._record.sha256

    def _is_known(self, reading: _Reading) -> bool:
        """Whether it is a shard of the manifest, if perhaps another one."""
        return reading.sha256 in self._owners

    def _read_index(self) -> bytes | None:
        try:
            return self._index_path.read_bytes()
        except OSError as error:
            self._found.append(_unreadable(self._index_path.name, error, 0))
            return None

    def _rebuilt_index(self) -> bytes | None:
        try:
            with tarfile.open(self._path, "r:") as file:
                return rebuild_index(file, self._token_bytes)
        except (OSError, ValueError, tarfile.TarError):
            return None

    def _members(self, index: bytes | None) -> list[Member]:
        if index is None:
            return []
        try:
            rows = parse_index(index)
            wrong = misplaced(rows, self._token_bytes)
            if wrong is None:
                return [Member(*row) for row in rows.tolist()]
            reason = f"its row {wrong} cannot be that of a member"
        except ValueError as error:
            reason = f"it is not the index of a shard ({error})"
        if self._is_index(index):
            self._found.append(Problem(self._index_path.name, reason))
        return []

    def _read_shard(self, members: Sequence[Member]) -> _Reading:
        reading = _Reading(self._record.name, self._manifest)
        try:
            with self._path.open("rb") as file:
                reading.read(file, members, self._token_bytes)
        except OSError as error:
            self._found.append(_unreadable(self._record.name, error, reading.size))
        return reading

    def _owner(self, digest: str, name: str) -> str | None:
        """The other file that should have this checksum, if there is one."""
        owner = self._owners.get(digest)
        return None if owner == name else owner

    def _index_problem(self, index: bytes, wanted: bytes | None, reading: _Reading) -> Problem:
        name, digest = self._index_path.name, sha256(index).hexdigest()
        if owner := self._owner(digest, name):
            return Problem(name, _swapped(owner))
        if wanted is None or not (self._is_index(wanted) or self._is_shard(reading)):
            return Problem(name, _other_sha256(digest, self._record.index_sha256))
        if index == wanted:
            return self._manifest_problem("index_sha256", digest, self._record.index_sha256)
        return Problem(name, "it is damaged: it differs from the index of its shard", _difference(index, wanted))

    def _shard_problems(self, reading: _Reading, members: Sequence[Member]) -> Iterator[Problem]:
        """What is wrong with the shard, whose ``members`` are known if there are any."""
        name, record = self._record.name, self._record
        if owner := self._owner(reading.sha256, name):
            yield Problem(name, _swapped(owner))
        elif reading.nothing_agrees:
            yield Problem(
                name,
                f"of its {reading.members} members, none holds the tokens that its index lists: "
                "it is a shard of another preparation, or was overwritten",
            )
        elif members:
            damage = [*self._damage(reading), *_end_problems(name, reading.size, reading.end)]
            yield from damage or self._disagreements(reading, members)
        elif not self._is_shard(reading):
            sentence = _other_sha256(reading.sha256, record.sha256)
            yield Problem(name, f"{sentence}; without its index, the damaged bytes cannot be told")
            yield from _end_problems(name, reading.size, record.bytes)

    def _damage(self, reading: _Reading) -> Iterator[Problem]:
        if reading.damaged:
            first = reading.damaged[0]
            reason = "do not have their checksum" if first.is_payload else "is not as it was written"
            others = len(reading.damaged) - 1
            more = f"; {others} more {'place is' if others == 1 else 'places are'} damaged" if others else ""
            yield Problem(self._record.name, f"{first.meaning} {reason}{more}", first.span)

    def _disagreements(self, reading: _Reading, members: Sequence[Member]) -> Iterator[Problem]:
        """What is wrong with an undamaged shard: its contents, or what the manifest says of it."""
        if faults := reading.contents.faults:
            others = len(faults) - 1
            more = f"; {others} more {'member is' if others == 1 else 'members are'} wrong" if others else ""
            yield Problem(self._record.name, faults[0].sentence + more, faults[0].span)
            return
        found: dict[str, int | str] = {
            "bytes": reading.size,
            "tokens": sum(member.tokens for member in members),
            "documents": reading.contents.documents,
            "sha256": reading.sha256,
        }
        for field, value in found.items():
            said = getattr(self._record, field)
            if value != said:
                yield self._manifest_problem(field, value, said)

    def _manifest_problem(self, field: str, found: int | str, said: int | str) -> Problem:
        return Problem(
            MANIFEST,
            f"it was changed: {field} of {self._record.name} is {said} there, and {found} by the shard and its index",
        )

    def _foreign_pair(self) -> Problem:
        return Problem(
            self._record.name,
            f"it and its index {self._index_path.name} agree with each other and not with the manifest: "
            "they are of another preparation",
        )


class _Reading:
    """One pass over a shard: its checksum, and what in it is not as its index says."""

    def __init__(self, shard: str, manifest: Manifest) -> None:
        self._shard = shard
        self._digest = sha256()
        self.is_whole = False
        """Whether the file has been read to its end."""
        self.size = 0
        """Bytes read."""
        self._file_size = 0
        self.end = 0
        """Bytes that the shard must have."""
        self.members = self.other_members = 0
        """Members whose tokens have been read, and those with other tokens than the index lists."""
        self.damaged: list[Region] = []
        part = Path(shard).stem.rpartition("-")[2]
        self.contents = ContentCheck(manifest, begins_chunk=int(part) == 0)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    @property
    def nothing_agrees(self) -> bool:
        """Whether no member is the right one; a single damaged member could be just that."""
        return self.members == self.other_members > 1

    def read(self, file: BufferedReader, members: Sequence[Member], token_bytes: int) -> None:
        """Read all of ``file``, comparing what it has of ``members``. Raises OSError where it cannot be read."""
        self._file_size = os.fstat(file.fileno()).st_size
        position = 0
        for member in members:
            regions = member_regions(self._shard, member, token_bytes)
            blocks = [self._take(file, region) for region in regions]
            position = regions[-1].span.stop
            damaged = self.damaged[-len(regions) :]
            self.members += regions[1].span.stop <= self.size
            self.other_members += regions[1] in damaged
            if position <= self.size and not set(regions).intersection(damaged):
                self.contents.add(member, blocks[1], blocks[4])
        if members:
            end = end_region(position)
            self._take(file, end)
            self.end = end.span.stop
        while block := file.read(_BLOCK):
            self._hash(block)
        self.is_whole = True

    def _take(self, file: BufferedReader, region: Region) -> bytes:
        # No more than there is: an index from other hands may promise more than fits into memory.
        data = file.read(min(region.size, max(0, self._file_size - self.size)))
        self._hash(data)
        if len(data) == region.size and not region.agrees(data):
            self.damaged.append(region)
        return data

    def _hash(self, data: bytes) -> None:
        self._digest.update(data)
        self.size += len(data)


def _unreadable(name: str, error: OSError, position: int) -> Problem:
    if isinstance(error, FileNotFoundError):
        return Problem(name, "it is missing")
    reached = f" behind byte {position}" if position else ""
    return Problem(name, f"it cannot be read{reached} ({error.strerror})")


def _end_problems(name: str, size: int, wanted: int) -> Iterator[Problem]:
    if size < wanted:
        yield Problem(name, f"it is cut short: it has {size} of {wanted} bytes", range(size, wanted))
    elif size > wanted:
        yield Problem(name, f"it has {size - wanted} bytes behind its end", range(wanted, size))


def _difference(found: bytes, wanted: bytes) -> range:
    """From the first byte that differs to the last one."""
    common = min(len(found), len(wanted))
    differing = np.flatnonzero(np.frombuffer(found, np.uint8, common) != np.frombuffer(wanted, np.uint8, common))
    first = int(differing[0]) if differing.size else common
    return range(first, int(differing[-1]) + 1 if len(found) == len(wanted) else max(len(found), len(wanted)))


def _swapped(other: str) -> str:
    return f"it holds what {other} should hold: the two were swapped, or one was copied over the other"


def _other_sha256(found: str, said: str) -> str:
    return f"its sha256 is {found} and the manifest says {said}"
