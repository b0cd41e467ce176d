"""The index of a shard: where the payloads of its members lie in the tar, and what they must hash to."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

INDEX_SUFFIX = ".idx.npy"
TOKENS_SUFFIX = ".tok"
LENGTHS_SUFFIX = ".len"
LENGTH = np.dtype("<u4")
"""Type of a document's length in a ``.len``."""

_ROW_TYPE = np.dtype("<i8")
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..{'descr': '<i8', 'fortran_order': False, 'shape': \((\d{1,9}), 7\), } *\n", re.DOTALL
)


def index_name(shard: str) -> str:
    """Name of the index beside the shard of that name."""
    return shard.removesuffix(".tar") + INDEX_SUFFIX


def member_stem(shard: str, group: int) -> str:
    """Name without suffix of the two files of a member, unique in its split: chunk of the input, then ``group``."""
    chunk = shard.split("-")[1]
    return f"{chunk}-{group:06d}"


class Member(NamedTuple):
    """One document group of a shard, its ``.tok`` and its ``.len``; offsets are of raw payloads in the tar.

    ``lengths`` lists the document pieces of the member in order, in tokens, each with the token that ends its
    document; they add up to ``tokens``. Only a document longer than a member is split, and it then has
    members of its own except the last, where others may follow its end. A leading 0 in ``lengths`` says that
    the piece after it continues the document of the preceding member (no document has length 0, so this is
    unambiguous).
    """

    offset: int
    tokens: int
    crc32: int
    lengths_offset: int
    lengths: int
    lengths_crc32: int
    group: int
    """Its number among those of the same split and chunk of the input: see ``member_stem``."""

    @property
    def end(self) -> int:
        """Offset in the tar of the first byte behind the member's payloads."""
        return self.lengths_offset + self.lengths * LENGTH.itemsize


def dump_index(members: Sequence[Member]) -> bytes:
    """A ``.npy`` file: int64 (members, 7), the columns being the fields of ``Member``."""
    buffer = io.BytesIO()
    rows = np.array(members, _ROW_TYPE).reshape(-1, len(Member._fields))
    np.save(buffer, rows, allow_pickle=False)
    return buffer.getvalue()


def parse_index(data: bytes) -> NDArray[np.int64]:
    """What ``dump_index`` wrote, as int64 (members, 7). Raises ValueError when it is something else.

    The rows may say anything: see ``layout.read_index``.
    """
    # numpy's own reader evaluates the header and reserves whatever memory that asks for.
    header = _HEADER.match(data)
    columns = len(Member._fields)
    if header is None or int(header[1]) * columns * _ROW_TYPE.itemsize != len(data) - header.end():
        raise ValueError(f"it is not a .npy file of int64 (members, {columns})")
    rows = np.frombuffer(data, _ROW_TYPE, offset=header.end()).reshape(-1, columns)
    index: NDArray[np.int64] = rows.astype(np.int64, copy=False)
    return index


def document_starts(lengths: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Positions in a member at which a document begins, from the member's ``.len`` (see ``Member``)."""
    ends = np.cumsum(lengths, dtype=np.int64)
    starts: NDArray[np.int64] = ends - lengths
    # After a leading 0 the first piece is the rest of an earlier document: neither entry begins one.
    return starts[2:] if lengths[0] == 0 else starts
