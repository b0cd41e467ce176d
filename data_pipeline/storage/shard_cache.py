"""Parts of remote shards, kept on the local disk: each is fetched once, by whichever process needs it first.

A shard's file in the cache has the shard's own offsets and holes where nothing was fetched; ``.ranges`` beside it lists
what was, one ``start stop`` a line. Nothing is locked and nothing is trusted: a process that was killed, another that
writes the same bytes, a full disk or a flipped bit leave at worst a range that is listed and wrong, which its checksum
finds and the reader fetches afresh.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from ...configs.errors import RunError
from .folder import ByteSource, Folder, LocalFile, LocalFolder

RANGES_SUFFIX = ".ranges"

_LINE = re.compile(rb"^(\d{1,18}) (\d{1,18})$", re.MULTILINE)


def cached(folder: Folder, fingerprint: str, cache: Path | None = None) -> Folder:
    """``folder`` if it is local, otherwise one that keeps what it reads under ``cache`` (see ``default_cache``).

    ``fingerprint`` is the data's identity: data that changed behind their URL never meet what was kept of the old.
    """
    if isinstance(folder, LocalFolder):
        return folder
    return CachedFolder(folder, (cache or default_cache()) / fingerprint)


def default_cache() -> Path:
    """The user's cache folder, as the XDG base directory specification places it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trine"


class CachedFolder:
    """A remote folder whose files never change, and a local folder that keeps parts of them; a ``storage.Folder``."""

    def __init__(self, remote: Folder, path: Path) -> None:
        self.location = remote.location
        self._remote = remote
        self._path = path

    def address(self, name: str) -> str:
        """URL of a file."""
        return self._remote.address(name)

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Sizes of those of the files that are there, as the server says."""
        return self._remote.sizes(names)

    def read_bytes(self, name: str, *, fresh: bool = False) -> bytes:
        """A whole file, kept as one. Raises FileNotFoundError, or RunError when server or cache fail."""
        kept = self._path / name
        if not fresh:
            with _using(self._path), suppress(FileNotFoundError):
                return kept.read_bytes()
        data = self._remote.read_bytes(name, fresh=True)
        with _using(self._path):
            self._path.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(data)
        return data

    def open(self, name: str, size: int) -> ByteSource:
        """A file of which parts are kept. Raises RunError when the cache cannot be used."""
        with _using(self._path):
            self._path.mkdir(parents=True, exist_ok=True)
            return CachedFile(self._remote.open(name, size), self._path / name)


class CachedFile:
    """One remote file and its part in the cache, a ``storage.ByteSource``."""

    def __init__(self, remote: ByteSource, path: Path) -> None:
        self.size = remote.size
        self._remote = remote
        self._path = path
        self._kept = LocalFile(path, os.O_RDWR | os.O_CREAT)
        self._list = LocalFile(path.with_name(path.name + RANGES_SUFFIX), os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self._lock = Lock()
        self._ranges = Ranges()
        self._listed = 0

    def read(self, offset: int, count: int, *, fresh: bool = False) -> NDArray[np.uint8]:
        """The ``count`` bytes at ``offset``; those that are not kept yet, or all with ``fresh``, are fetched first."""
        stop = min(offset + count, self.size)
        for gap in [(offset, stop)] if fresh else self._missing(offset, stop):
            self._fetch(*gap, fresh=fresh)
        with _using(self._path.parent):
            # No more than there is: a manifest from other hands may promise more than fits into memory.
            return self._kept.read(offset, max(0, min(count, self._kept.size - offset)))

    def _missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        with self._lock:
            missing = self._ranges.missing(start, stop)
            if missing and self._list.size > self._listed:  # other processes fetch too
                self._read_list()
                missing = self._ranges.missing(start, stop)
            return missing

    def _read_list(self) -> None:
        with _using(self._path.parent):
            added = self._list.read(self._listed, self._list.size - self._listed).tobytes()
        whole = added[: added.rfind(b"\n") + 1]
        self._listed += len(whole)
        for start, stop in _LINE.findall(whole):
            self._ranges.add(int(start), int(stop))

    def _fetch(self, start: int, stop: int, *, fresh: bool) -> None:
        data = self._remote.read(start, stop - start, fresh=True)
        # What others kept meanwhile may be verified already: it is not read through again, so it is not written again.
        for first, last in [(start, stop)] if fresh else self._missing(start, stop):
            self._keep(first, data[first - start : last - start].tobytes())

    def _keep(self, start: int, data: bytes) -> None:
        with _using(self._path.parent):
            _write_at(self._kept.descriptor, data, start)
            # Listed after it was written, so that a process that is killed in between only loses it. The line break in
            # front ends what a full disk has cut short.
            os.write(self._list.descriptor, b"\n%d %d\n" % (start, start + len(data)))
        with self._lock:
            self._ranges.add(start, start + len(data))


class Ranges:
    """A set of half-open ranges of integers."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        """Of disjoint ranges that do not touch, in increasing order."""

    def add(self, start: int, stop: int) -> None:
        """Include [start, stop); nothing happens when it is empty."""
        if start >= stop:
            return
        first, last = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of [start, stop) that are not included, in order."""
        gaps: list[tuple[int, int]] = []
        for number in range(bisect_right(self._stops, start), bisect_left(self._starts, stop)):
            if start < self._starts[number]:
                gaps.append((start, self._starts[number]))
            start = self._stops[number]
        if start < stop:
            gaps.append((start, stop))
        return gaps


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of ``data``: the system may take less at once, and does so when a disk is nearly full."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


@contextmanager
def _using(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"the cache of remote data {path} cannot be used ({error.strerror}); "
            "free space there, or set data.cache to a folder on another disk"
        ) from error
