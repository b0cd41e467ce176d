"""A folder of prepared data, on this machine or behind a URL, as named files that are read in pieces."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...configs.locations import check_location, is_remote
from .remote_folder import RemoteFolder


class ByteSource(Protocol):
    """One file that is read at any offset, by several threads at once."""

    @property
    def size(self) -> int:
        """Size in bytes."""

    def read(self, offset: int, count: int, *, fresh: bool = False) -> NDArray[np.uint8]:
        """The ``count`` bytes at ``offset``: fewer when the file ends before, and never more.

        ``fresh`` says that what was read before was wrong: no copy that is kept on the way answers. Raises OSError when
        the file cannot be read, RunError when what lies on the way to it fails.
        """


class Folder(Protocol):
    """A flat folder of files."""

    @property
    def location(self) -> str:
        """What a user calls it: a path or a URL."""

    def address(self, name: str) -> str:
        """Path or URL of a file, for messages."""

    def read_bytes(self, name: str, *, fresh: bool = False) -> bytes:
        """A whole file; ``fresh`` and the errors as for ``ByteSource.read``, FileNotFoundError if it is not there."""

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Sizes in bytes of those of the files that are there. Raises FileNotFoundError if the folder is not there."""

    def open(self, name: str, size: int) -> ByteSource:
        """A file that ought to have ``size`` bytes. Raises OSError, of a remote file only when that is read."""


def open_folder(location: str | Path) -> Folder:
    """The folder at a path, or at an http://, https:// or s3:// URL. Nothing is touched yet.

    Raises UsageError for a location of another kind, a command in particular, and for a URL whose client is not
    installed.
    """
    if isinstance(location, Path):
        return LocalFolder(location)
    check_location("data folder", location)
    return RemoteFolder(location) if is_remote(location) else LocalFolder(Path(location))


class LocalFolder:
    """A folder of this machine's file systems, a ``Folder``."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def location(self) -> str:
        """The path."""
        return str(self._path)

    def address(self, name: str) -> str:
        """Path of a file."""
        return str(self._path / name)

    def read_bytes(self, name: str, *, fresh: bool = False) -> bytes:
        """A whole file. Raises OSError."""
        return (self._path / name).read_bytes()

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Sizes in bytes of those of the files that are there, from one pass over the folder."""
        wanted = set(names)
        with os.scandir(self._path) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.name in wanted and entry.is_file()}

    def open(self, name: str, size: int) -> ByteSource:
        """The file of that name, open. Raises OSError."""
        return LocalFile(self._path / name, os.O_RDONLY)


class LocalFile:
    """An open file, a ``ByteSource``, closed when nobody holds it any more.

    It is read by calls and not mapped into memory: a file that is cut while it is mapped ends the process.
    """

    def __init__(self, path: Path, flags: int) -> None:
        self.descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
        # Another thread may still read when the file is let go of: only the last reference may close it.
        weakref.finalize(self, os.close, self.descriptor)

    @property
    def size(self) -> int:
        """Size in bytes, at this moment."""
        return os.fstat(self.descriptor).st_size

    def read(self, offset: int, count: int, *, fresh: bool = False) -> NDArray[np.uint8]:
        """The ``count`` bytes at ``offset``: fewer, when the file ends before."""
        data = os.pread(self.descriptor, count, offset)
        while 0 < len(data) < count and (more := os.pread(self.descriptor, count - len(data), offset + len(data))):
            data += more
        return np.frombuffer(data, np.uint8)
