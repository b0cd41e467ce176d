"""Every byte of a shard, as a function of its index: which part of the tar it belongs to, and what must stand there."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from .manifest import ShardRecord
from .member_index import LENGTH, LENGTHS_SUFFIX, TOKENS_SUFFIX, Member, dump_index, member_stem, parse_index

_Size = TypeVar("_Size", int, NDArray[np.int64])

_END_MARK = 2 * tarfile.BLOCKSIZE
_LARGEST_FILE = 8**11 - 1
"""Bytes: the header of a USTAR file has eleven octal digits for its size."""
_LARGEST_FIELD = 1 << 60
"""Of an index: sums of a few such numbers still fit into 64 bits."""


@dataclass(frozen=True, slots=True)
class Region:
    """A run of bytes with one meaning."""

    start: int
    size: int
    meaning: str
    """What a message calls it."""
    expected: bytes | int
    """The bytes themselves or, of a payload, their crc32."""

    @property
    def span(self) -> range:
        """Where it lies in the file."""
        return range(self.start, self.start + self.size)

    @property
    def is_payload(self) -> bool:
        """Whether it holds what the shard was written for, rather than what makes it a tar."""
        return isinstance(self.expected, int)

    def agrees(self, data: bytes) -> bool:
        """Whether ``data`` is what must stand here."""
        return (crc32(data) if isinstance(self.expected, int) else data) == self.expected


def member_regions(shard: str, member: Member, token_bytes: int) -> tuple[Region, ...]:
    """The six regions of a member of the shard of that name: header, payload and padding of its two files."""
    stem = member_stem(shard, member.group)
    return (
        *_file_regions(stem + TOKENS_SUFFIX, member.offset, member.tokens * token_bytes, member.crc32),
        *_file_regions(
            stem + LENGTHS_SUFFIX, member.lengths_offset, member.lengths * LENGTH.itemsize, member.lengths_crc32
        ),
    )


def end_region(start: int) -> Region:
    """The end mark of a tar whose members end at ``start``: zeros, up to a whole record."""
    stop = _round_up(start + _END_MARK, tarfile.RECORDSIZE)
    return Region(start, stop - start, "the end of the archive", bytes(stop - start))


def misplaced(members: NDArray[np.int64], token_bytes: int) -> int | None:
    """The first row of ``members``, (members, 7), that cannot be that of a member of a shard, or None.

    In a shard the files lie one behind the other and the groups are numbered in order.
    """
    offset, tokens, _, lengths_offset, lengths, _, group = members.T
    token_size, lengths_size = tokens * token_bytes, lengths * LENGTH.itemsize
    ends = _round_up(lengths_offset + lengths_size)
    wrong = (
        ((members < 0) | (members > _LARGEST_FIELD)).any(axis=1)
        | (np.minimum(tokens, lengths) < 1)
        | (np.maximum(token_size, lengths_size) > _LARGEST_FILE)
        | (offset != np.append(0, ends)[:-1] + tarfile.BLOCKSIZE)
        | (lengths_offset != _round_up(offset + token_size) + tarfile.BLOCKSIZE)
        | (group != group[:1] + np.arange(group.size))
    )
    return int(wrong.argmax()) if wrong.any() else None


def read_index(data: bytes, record: ShardRecord, token_bytes: int) -> NDArray[np.int64]:
    """The members that an index lists, (members, 7): such as the shard of that record can have.

    Raises ValueError otherwise. Data from other hands have right checksums whatever they say.
    """
    members = parse_index(data)
    wrong = misplaced(members, token_bytes)
    if wrong is not None:
        raise ValueError(f"its row {wrong} cannot be that of a member")
    tokens = int(members[:, Member._fields.index("tokens")].sum())
    if tokens != record.tokens:
        raise ValueError(f"it lists {tokens} tokens and the manifest says {record.tokens}")
    end = Member(*members[-1].tolist()).end
    if end > record.bytes:
        raise ValueError(f"its last member ends at byte {end} and the manifest says {record.bytes}")
    return members


def rebuild_index(file: tarfile.TarFile, token_bytes: int) -> bytes:
    """The index of a shard, from the shard itself.

    Raises ValueError or tarfile.TarError when the tar is none of ours or is broken.
    """
    pairs = list(_payloads(file))
    members: list[Member] = []
    for (name, offset, size, checksum), (_, lengths_offset, lengths_size, lengths_checksum) in zip(
        pairs[::2], pairs[1::2], strict=True
    ):
        group = int(name.removesuffix(TOKENS_SUFFIX).rpartition("-")[2])
        tokens, lengths = size // token_bytes, lengths_size // LENGTH.itemsize
        members.append(Member(offset, tokens, checksum, lengths_offset, lengths, lengths_checksum, group))
    return dump_index(members)


def _file_regions(name: str, offset: int, size: int, checksum: int) -> Iterator[Region]:
    header = tarfile.TarInfo(name)
    header.size = size
    block = header.tobuf(tarfile.USTAR_FORMAT)
    padding = _round_up(size) - size
    kind = "document lengths" if name.endswith(LENGTHS_SUFFIX) else "tokens"
    yield Region(offset - len(block), len(block), f"the tar header of {name}", block)
    yield Region(offset, size, f"the {kind} in {name}", checksum)
    yield Region(offset + size, padding, f"the padding behind {name}", bytes(padding))


def _payloads(file: tarfile.TarFile) -> Iterator[tuple[str, int, int, int]]:
    for header in file:
        payload = file.extractfile(header)
        if payload is None or header.issparse():  # a sparse file may claim any size
            raise ValueError(f"{header.name} is not a file")
        yield header.name, header.offset_data, header.size, crc32(payload.read())


def _round_up(size: _Size, unit: int = tarfile.BLOCKSIZE) -> _Size:
    return -(-size // unit) * unit
