"""A folder behind an http(s):// or s3:// URL: transient failures are tried again, others said in one sentence."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...configs.errors import RunError, UsageError
from ...configs.locations import scheme_of
from ..extras import missing_package
from .http_store import HttpStore
from .s3_store import S3Store

_PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further attempt, on average."""

_Result = TypeVar("_Result")


class Store(Protocol):
    """What a kind of server can do.

    A file that is not there is a FileNotFoundError and a refusal a PermissionError; UsageError is for a server that
    cannot do it at all. After any other exception the call may succeed when it is repeated.
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
        return _patiently(url, lambda: self._store.read(url))

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Sizes in bytes of those of the files that are there."""
        wanted = list(names)
        return _patiently(self.location, lambda: self._store.sizes(self.location, wanted))

    def open(self, name: str, size: int) -> RemoteFile:
        """The file of that name, which is asked for only when it is read."""
        return RemoteFile(self, name, size)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, fewer when it ends before. Errors as for ``read_bytes``."""
        url = self.address(name)
        return _patiently(url, lambda: self._store.read_range(url, start, stop))


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


def _patiently(url: str, request: Callable[[], _Result]) -> _Result:
    attempt = 0
    while True:
        try:
            return request()
        except (UsageError, FileNotFoundError):
            raise
        except PermissionError as error:
            raise RunError(f"{url} may not be read ({error}); check the credentials for it") from error
        except Exception as error:  # the clients have dozens of kinds without a common base
            if attempt == len(_PAUSES):
                raise RunError(
                    f"{url} cannot be read ({str(error) or type(error).__name__}, {attempt + 1} attempts); "
                    "check the network and the server, then run again"
                ) from error
        # Thousands of ranks that lost the same server must not return to it at the same moment.
        time.sleep(_PAUSES[attempt] * random.uniform(0.5, 1.5))
        attempt += 1
