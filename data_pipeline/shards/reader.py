"""Reading one shard at random: its index, its members, and their checksums."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from hashlib import sha256
from threading import Lock
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ...configs.errors import RunError
from ..storage.folder import Folder
from .layout import read_index
from .manifest import MANIFEST, ShardRecord
from .member_index import LENGTH, LENGTHS_SUFFIX, TOKENS_SUFFIX, Member, document_starts, index_name, member_stem
from .open_shards import OPEN_SHARDS, OpenShard, OpenShards

Piece = tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]
"""A run of tokens, and the positions in it at which a document begins, as far as they were asked for."""

_UNASKED = np.empty(0, np.int64)

_REMEDY = "restore it from a copy, or prepare the data again"
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Reasons of the machine, which say nothing about the file."""
_OF_THE_FILE = (errno.ENOENT, errno.EIO)
"""Reasons that a missing file and a bad sector have; others are of the file system."""


class Damage(RunError):
    """Prepared data that are not what they were: missing, cut, changed or unreadable. A run may skip them."""

    def __init__(self, subject: str, reason: str, *, shard: str, member: str | None = None) -> None:
        super().__init__(f"{subject} {reason}; {_REMEDY}")
        self.shard = shard
        """Path or URL of the shard."""
        self.member = member
        """Name of the damaged member in the tar, if it is one member."""
        self.reason = reason
        """What is wrong, as the message says it."""


class _Unreadable(Exception):
    """The operating system did not open or read what ``subject`` names."""

    def __init__(self, subject: str, error: OSError) -> None:
        super().__init__(subject)
        self.subject = subject
        self.error = error


class ShardReader:
    """Random access to the tokens of one shard, for several threads at once.

    Nothing is touched before the first read. From then on the shard's size, its index and every member are verified
    when they are first needed: a member that is damaged in a copy that is kept on the way is fetched afresh, once.
    ``opened`` bounds what stays open; the caller may read as many shards as it likes.

    ``read`` raises Damage when the shard or the index is missing or is not what the manifest says, when a member fails
    its checksum, and when the disk cannot read it; RunError when the network, the file system, the cache or the machine
    fails.
    """

    def __init__(
        self, folder: Folder, record: ShardRecord, dtype: np.dtype[np.unsignedinteger], opened: OpenShards = OPEN_SHARDS
    ) -> None:
        self._folder = folder
        self._record = record
        self._dtype = dtype
        self._opened = opened
        self._lock = Lock()
        # Outlives the open shard, so that one that comes back is not read through again.
        self._verified = np.zeros(0, np.bool_)

    @property
    def address(self) -> str:
        """Path or URL of the shard."""
        return self._folder.address(self._record.name)

    def read(self, start: int, stop: int, *, documents: bool = True) -> list[Piece]:
        """Tokens [start, stop) of the shard, in one piece for each member that holds some of them.

        Without ``documents`` nothing is read of where they begin, which is half of the work for short windows.
        """
        try:
            return self._read(start, stop, documents)
        except _Unreadable:
            # Network file systems come back, and what they invalidated can be opened anew.
            self._forget()
        try:
            return self._read(start, stop, documents)
        except _Unreadable as failure:
            raise self._failure(failure.subject, failure.error) from failure.error

    def _read(self, start: int, stop: int, documents: bool) -> list[Piece]:
        shard = self._open()
        first = int(shard.ends.searchsorted(start, "right"))
        last = int(shard.ends.searchsorted(stop, "left")) + 1
        if not self._verified[first:last].all():
            self._verify(shard, first, last)
        return [self._piece(shard, number, start, stop, documents) for number in range(first, last)]

    def _piece(self, shard: OpenShard, number: int, start: int, stop: int, documents: bool) -> Piece:
        member = shard.member(number)
        origin = int(shard.ends[number]) - member.tokens
        begin, end = max(start - origin, 0), min(stop - origin, member.tokens)
        width = self._dtype.itemsize
        tokens = self._bytes(shard, member.offset + begin * width, (end - begin) * width).view(self._dtype)
        if not documents:
            return tokens, _UNASKED
        lengths = self._bytes(shard, member.lengths_offset, member.lengths * LENGTH.itemsize).view(LENGTH)
        starts = document_starts(lengths)
        inside = slice(int(starts.searchsorted(begin)), int(starts.searchsorted(end)))
        return tokens, starts[inside] - begin

    def _open(self) -> OpenShard:
        shard = self._opened.get(self)
        if shard is None:
            with self._lock:
                shard = self._opened.get(self)
                if shard is None:
                    shard = self._open_afresh()
                    self._opened.keep(self, shard)
        return shard

    def _open_afresh(self) -> OpenShard:
        record = self._record
        try:
            source = self._folder.open(record.name, record.bytes)
            size = source.size
        except OSError as error:
            raise _Unreadable(f"shard {self.address}", error) from error
        if size != record.bytes:
            raise self._damage(f"has {size} bytes and the manifest says {record.bytes}")
        members = self._index()
        ends = np.cumsum(members[:, Member._fields.index("tokens")])
        if not self._verified.size:
            self._verified = np.zeros(len(members), np.bool_)
        return OpenShard(source, members, ends)

    def _index(self) -> NDArray[np.int64]:
        """The index, verified. It is small, so reading it again is cheaper than holding those of all shards."""
        name = index_name(self._record.name)
        subject = f"index {self._folder.address(name)}"
        found = ""
        for fresh in (False, True):
            try:
                data = self._folder.read_bytes(name, fresh=fresh)
            except OSError as error:
                raise _Unreadable(subject, error) from error
            found = sha256(data).hexdigest()
            if found == self._record.index_sha256:
                return self._parsed(subject, data)
        reason = f"is damaged: its sha256 is {found} and the manifest says {self._record.index_sha256}"
        raise Damage(subject, reason, shard=self.address)

    def _parsed(self, subject: str, data: bytes) -> NDArray[np.int64]:
        try:
            return read_index(data, self._record, self._dtype.itemsize)
        except ValueError as error:
            raise Damage(subject, f"is not that of its shard ({error})", shard=self.address) from error

    def _verify(self, shard: OpenShard, first: int, last: int) -> None:
        """Make sure of the members [first, last); neighbours that were not read before are read in one go."""
        with self._lock:
            numbers = first + np.flatnonzero(~self._verified[first:last])
            for run in np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1):
                if run.size:
                    self._verify_run(shard, int(run[0]), int(run[-1]) + 1)

    def _verify_run(self, shard: OpenShard, first: int, last: int) -> None:
        # From the end of the member before, headers included: then neighbouring runs leave no gaps between them.
        origin = shard.member(first - 1).end if first else shard.member(0).offset
        data = self._bytes(shard, origin, shard.member(last - 1).end - origin)
        for number in range(first, last):
            for name, offset, size, expected in self._payloads(shard.member(number)):
                payload = data[offset - origin : offset - origin + size]
                if crc32(payload.data) != expected:
                    actual = crc32(self._bytes(shard, offset, size, fresh=True).data)
                    if actual != expected:
                        raise self._damage(
                            f"is damaged: expected crc32 {expected:08x}, actual {actual:08x}", member=name
                        )
            self._verified[number] = True

    def _payloads(self, member: Member) -> Iterator[tuple[str, int, int, int]]:
        """Name, offset, size in bytes and crc32 of the two files of a member."""
        stem = member_stem(self._record.name, member.group)
        yield stem + TOKENS_SUFFIX, member.offset, member.tokens * self._dtype.itemsize, member.crc32
        yield stem + LENGTHS_SUFFIX, member.lengths_offset, member.lengths * LENGTH.itemsize, member.lengths_crc32

    def _bytes(self, shard: OpenShard, offset: int, count: int, *, fresh: bool = False) -> NDArray[np.uint8]:
        try:
            data = shard.source.read(offset, count, fresh=fresh)
            if data.size < count and not fresh:
                data = shard.source.read(offset, count, fresh=True)
        except OSError as error:
            raise _Unreadable(f"shard {self.address}", error) from error
        if data.size < count:
            raise self._damage(f"ends before byte {offset + count} and the manifest says {self._record.bytes}")
        return data

    def _damage(self, reason: str, member: str | None = None) -> Damage:
        subject = f"shard {self.address}, member {member}" if member else f"shard {self.address}"
        return Damage(subject, reason, shard=self.address, member=member)

    def _forget(self) -> None:
        """Open the shard anew at the next read, which may find another file of its name."""
        with self._lock:
            self._opened.drop(self)
            self._verified[:] = False

    def _failure(self, subject: str, error: OSError) -> RunError:
        reason = f"cannot be read ({error.strerror or error})"
        if error.errno in _EXHAUSTED:
            return RunError(f"{subject} {reason}; raise the limit of the process (ulimit -n, memory) and run again")
        if (error.errno in _OF_THE_FILE or isinstance(error, FileNotFoundError)) and self._folder_is_there():
            return Damage(subject, reason, shard=self.address)
        return RunError(f"{subject} {reason}; check the file system and its permissions, then run again")

    def _folder_is_there(self) -> bool:
        """Whether the folder still has its manifest: all files of a file system that was unmounted are missing."""
        try:
            return MANIFEST in self._folder.sizes([MANIFEST])
        except OSError:
            return False
