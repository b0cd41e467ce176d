"""Writing shards: ordinary USTAR webdataset tars of token ids, the same bytes for the same documents.

``{split}-{chunk:05d}-{part:03d}.tar``, a part of what a chunk of the input became, holds for every document group
``{chunk:05d}-{group:06d}.tok``, raw little-endian token ids, and ``.len``, uint32 document lengths
(``member_index.Member`` says how they are to be read). The payload is not compressed, so the index beside the tar
makes it randomly readable, while tar and webdataset read it in sequence.
"""

from __future__ import annotations

import io
import tarfile
from hashlib import file_digest, sha256
from pathlib import Path
from types import TracebackType
from typing import Self
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ..durable import commit, discard, open_temporary, write_durably
from .manifest import ShardRecord
from .member_index import (
    LENGTH,
    LENGTHS_SUFFIX,
    TOKENS_SUFFIX,
    Member,
    document_starts,
    dump_index,
    index_name,
    member_stem,
)

SHARD_TOKENS = 1 << 27
"""256 MiB of uint16: few enough files for a trillion tokens, and sequential enough for any file system."""
MEMBER_TOKENS = 1 << 17
"""Verified at once on first touch, so small; tar headers are then less than 1 % of the file."""


class ShardWriter:
    """Writes one chunk's shards of a split, each closed by the first member with which it holds ``shard_tokens``.

    Use it as a context manager. After an exception the open shard is gone; the finished ones count for nothing until
    the record of the chunk names them.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        chunk: int = 0,
        *,
        shard_tokens: int = SHARD_TOKENS,
        member_tokens: int = MEMBER_TOKENS,
    ) -> None:
        self._directory = directory
        self._prefix = f"{split}-{chunk:05d}"
        self._shard_tokens = shard_tokens
        self._member_tokens = min(member_tokens, shard_tokens)
        self._records: list[ShardRecord] = []
        self._shard: _Shard | None = None
        self._group = 0
        self._pieces: list[NDArray[np.unsignedinteger]] = []
        self._lengths: list[int] = []
        self._tokens = 0

    def add(self, document: NDArray[np.unsignedinteger]) -> None:
        """Append one document: (length,) token ids, little-endian, of which the last ends the document."""
        if document.size == 0:
            raise ValueError("a document has at least the token that ends it")
        if self._tokens + document.size > self._member_tokens:
            self._finish_member()
        for start in range(0, document.size, self._member_tokens):
            if start:
                self._finish_member()
                self._lengths.append(0)
            piece = document[start : start + self._member_tokens]
            self._pieces.append(piece)
            self._lengths.append(piece.size)
            self._tokens += piece.size

    def finish(self) -> list[ShardRecord]:
        """Write what is still held; the records of all shards, in order. Nothing may be added afterwards."""
        self._finish_member()
        self._finish_shard()
        return self._records

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard is not None:
            self._shard.abandon()

    def _finish_member(self) -> None:
        if not self._tokens:
            return
        if self._shard is None:
            name = f"{self._prefix}-{len(self._records):03d}.tar"
            self._shard = _Shard(self._directory / name)
        self._shard.append(self._group, np.concatenate(self._pieces), np.array(self._lengths, LENGTH))
        self._group += 1
        self._pieces, self._lengths, self._tokens = [], [], 0
        if self._shard.tokens >= self._shard_tokens:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self._records.append(self._shard.finish())
            self._shard = None


class _Shard:
    """One tar being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_temporary(path)
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self._members: list[Member] = []
        self._documents = 0
        self.tokens = 0

    def append(self, group: int, tokens: NDArray[np.unsignedinteger], lengths: NDArray[np.uint32]) -> None:
        stem = member_stem(self._path.name, group)
        offset, checksum = self._add(stem + TOKENS_SUFFIX, tokens.tobytes())
        lengths_offset, lengths_checksum = self._add(stem + LENGTHS_SUFFIX, lengths.tobytes())
        self._members.append(
            Member(offset, tokens.size, checksum, lengths_offset, lengths.size, lengths_checksum, group)
        )
        self._documents += document_starts(lengths).size
        self.tokens += tokens.size

    def finish(self) -> ShardRecord:
        self._tar.close()
        size = self._file.tell()
        self._file.seek(0)
        digest = file_digest(self._file, "sha256").hexdigest()
        commit(self._file, self._path)
        index = dump_index(self._members)
        write_durably(self._path.with_name(index_name(self._path.name)), index)
        return ShardRecord(
            name=self._path.name,
            bytes=size,
            tokens=self.tokens,
            documents=self._documents,
            sha256=digest,
            index_sha256=sha256(index).hexdigest(),
        )

    def abandon(self) -> None:
        discard(self._file)

    def _add(self, name: str, payload: bytes) -> tuple[int, int]:
        """Append a member; the byte offset of its payload and its checksum."""
        # TarInfo's defaults (time 0, owner 0 without a name, one mode) make the bytes a function of the
        # payload.
        header = tarfile.TarInfo(name)
        header.size = len(payload)
        offset = self._file.tell() + tarfile.BLOCKSIZE
        self._tar.addfile(header, io.BytesIO(payload))
        return offset, crc32(payload)
