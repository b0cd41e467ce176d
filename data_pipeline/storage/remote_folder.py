"""A folder behind an http(s):// or s3:// URL, read with patience."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...configs.locations import scheme_of
from ..extras import missing_package
from .http_store import HttpStore
from .patience import patiently
from .s3_store import S3Store


class Store(Protocol):
    """What a kind of server can do.

    A file that is not there is a FileNotFoundError and a refusal a PermissionError; UsageError is for a server that
    cannot do it at all, RunError for what was tried in vain. After any other exception the call may succeed when it is
    repeated.
    """

    def read(self, url: str) -> bytes:
        """A whole file."""

    def read_range(self, url: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, fewer when it ends before."""

    def sizes(self, folder: str, names: Iterable[str]) -> dict[str, int]:
        """Sizes in bytes of those of the files in the folder of that URL that are there."""


class RemoteFolder:
    """A folder behind a URL, a ``storage.Folder``. It keeps nothing of what it reads: ``shard_cache`` does.

    Raises UsageError when the client for such URLs is not installed.
    """

    def __init__(self, location: str) -> None:
        self.location = location.rstrip("/")
        self._store = _store(location)

    def address(self, name: str) -> str:
        """URL of a file."""
        return f"{self.location}/{name}"

    def read_bytes(self, name: str, *, fresh: bool = False) -> bytes:
        """A whole file. Raises FileNotFoundError, or RunError when the server cannot be read from."""
        url = self.address(name)
        return patiently(url, lambda: self._store.read(url))

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Sizes in bytes of those of the files that are there."""
        wanted = list(names)
        return patiently(self.location, lambda: self._store.sizes(self.location, wanted))

    def open(self, name: str, size: int) -> RemoteFile:
        """The file of that name, which is asked for only when it is read."""
        return RemoteFile(self, name, size)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, fewer when it ends before. Errors as for ``read_bytes``."""
        url = self.address(name)
        return patiently(url, lambda: self._store.read_range(url, start, stop))


class RemoteFile:
    """One file of a ``RemoteFolder``, a ``storage.ByteSource``."""

    def __init__(self, folder: RemoteFolder, name: str, size: int) -> None:
        self._folder = folder
        self._name = name
        self.size = size
        """What is expected. The server is not asked: thousands of ranks and shards would be millions of requests."""

    def read(self, offset: int, count: int, *, fresh: bool = False) -> NDArray[np.uint8]:
        """The ``count`` bytes at ``offset``, in one request."""
        return np.frombuffer(self._folder.read_range(self._name, offset, offset + count), np.uint8)


def _store(location: str) -> Store:
    try:
        return S3Store() if scheme_of(location) == "s3" else HttpStore()
    except ImportError as error:
        raise missing_package(location, str(error.name), "remote") from error
