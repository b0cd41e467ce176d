"""Reading one shard at random: its index, its members, and their checksums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TypeVar
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ..configs.errors import RunError
from .manifest import ShardRecord
from .member_index import INDEX_SUFFIX, Member, document_starts, parse_index

Piece = tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]
"""A run of tokens, and the positions in it at which a document begins."""

_Unsigned = TypeVar("_Unsigned", bound=np.unsignedinteger)

_REMEDY = "restore it from a copy, or prepare the data again"


def map_file(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file, mapped into memory and read only when touched."""
    return np.memmap(path, np.uint8, "r")


class ShardReader:
    """Random access to the tokens of one shard; every member is verified the first time it is touched.

    ``mapped`` gives the bytes of a file; the caller decides how many shards stay open. Raises RunError when
    the shard is missing or has another size than the manifest says, and later when a member is damaged.
    """

    def __init__(
        self,
        path: Path,
        record: ShardRecord,
        dtype: np.dtype[np.unsignedinteger],
        mapped: Callable[[Path], NDArray[np.uint8]] = map_file,
    ) -> None:
        self._path = path
        self._record = record
        self._dtype = dtype
        self._mapped = mapped
        self._check_size()

    def read(self, start: int, stop: int) -> Iterator[Piece]:
        """Tokens [start, stop) of the shard, in one piece for each member that holds some of them."""
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            tokens, starts = self._member(number)
            first = int(self._ends[number]) - tokens.size
            inside = slice(start - first, min(stop - first, tokens.size))
            within = (starts >= inside.start) & (starts < inside.stop)
            yield tokens[inside], starts[within] - inside.start
            start = first + inside.stop
            number += 1

    @cached_property
    def _index(self) -> NDArray[np.int64]:
        path = self._path.with_suffix(INDEX_SUFFIX)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RunError(f"index {path} cannot be read ({error.strerror}); {_REMEDY}") from error
        found = sha256(data).hexdigest()
        if found != self._record.index_sha256:
            raise RunError(
                f"index {path} is damaged: its sha256 is {found} and the manifest says "
                f"{self._record.index_sha256}; {_REMEDY}"
            )
        return parse_index(data)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self._index[:, Member._fields.index("tokens")])

    @cached_property
    def _verified(self) -> NDArray[np.bool_]:
        return np.zeros(len(self._index), np.bool_)

    def _member(self, number: int) -> Piece:
        member = Member(*self._index[number].tolist())
        tokens = self._payload(member.offset, member.tokens, self._dtype)
        lengths = self._payload(member.lengths_offset, member.lengths, np.dtype("<u4"))
        if not self._verified[number]:
            self._verify(f"{member.group:09d}.tok", tokens, member.crc32)
            self._verify(f"{member.group:09d}.len", lengths, member.lengths_crc32)
            self._verified[number] = True
        return tokens, document_starts(lengths)

    def _payload(self, offset: int, count: int, dtype: np.dtype[_Unsigned]) -> NDArray[_Unsigned]:
        return np.frombuffer(self._mapped(self._path), dtype, count, offset)

    def _verify(self, name: str, payload: NDArray[np.unsignedinteger], expected: int) -> None:
        actual = crc32(payload.data)
        if actual != expected:
            raise RunError(
                f"shard {self._path}, member {name} is damaged: expected crc32 {expected:08x}, "
                f"actual {actual:08x}; {_REMEDY}"
            )

    def _check_size(self) -> None:
        try:
            size = self._path.stat().st_size
        except OSError as error:
            raise RunError(f"shard {self._path} cannot be read ({error.strerror}); {_REMEDY}") from error
        if size != self._record.bytes:
            raise RunError(
                f"shard {self._path} has {size} bytes and the manifest says {self._record.bytes}; {_REMEDY}"
            )
