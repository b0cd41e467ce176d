"""Files on a web server: range requests, and sizes without a listing."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ...configs.errors import UsageError

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

_CONNECT_SECONDS = 30
_SILENCE_SECONDS = 60
"""How long a server may send nothing before a request counts as failed."""

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class HttpStore:
    """Files behind http:// and https:// URLs, a ``remote_folder.Store``.

    The proxy of the environment is used, and passwords come from ``.netrc``. Raises ImportError without aiohttp.
    """

    def __init__(self) -> None:
        import aiohttp
        import fsspec

        silence = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
        # A compressed answer has other offsets than the file.
        headers = {"Accept-Encoding": "identity"}
        self._files: Any = fsspec.filesystem(
            "http",
            skip_instance_cache=True,
            client_kwargs={"trust_env": True, "timeout": silence, "headers": headers},
        )

    def read(self, url: str) -> bytes:
        """A whole file."""
        return self._run(self._read, url)

    def read_range(self, url: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file. Raises UsageError when the server answers with the whole file instead."""
        return self._run(self._read_range, url, start, stop)

    def sizes(self, folder: str, names: Iterable[str]) -> dict[str, int]:
        """Sizes of those of the files that are there, by one HEAD request for each: the web has no listing."""
        return self._run(self._sizes, folder, names)

    def _run(
        self,
        request: Callable[_Arguments, Coroutine[Any, Any, _Result]],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> _Result:
        from fsspec.asyn import sync

        result: _Result = sync(self._files.loop, request, *args, **kwargs)
        return result

    async def _session(self) -> ClientSession:
        session: ClientSession = await self._files.set_session()
        return session

    async def _read(self, url: str) -> bytes:
        async with (await self._session()).get(url) as response:
            _check_status(response)
            return await response.read()

    async def _read_range(self, url: str, start: int, stop: int) -> bytes:
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        async with (await self._session()).get(url, headers=headers) as response:
            if response.status == 416:  # the file ends before ``start``
                return b""
            _check_status(response)
            # Without the part's own status the whole file would follow, for every sample.
            if response.status != 206:
                raise UsageError(
                    f"the server of {url} cannot send parts of files (no HTTP range requests); "
                    "use another server, or copy the data to a local folder"
                )
            return await response.read()

    async def _sizes(self, folder: str, names: Iterable[str]) -> dict[str, int]:
        names = list(names)
        sizes = await asyncio.gather(*(self._size(f"{folder}/{name}") for name in names))
        return {name: size for name, size in zip(names, sizes, strict=True) if size is not None}

    async def _size(self, url: str) -> int | None:
        async with (await self._session()).head(url, allow_redirects=True) as response:
            try:
                _check_status(response)
            except FileNotFoundError:
                return None
            return int(response.headers["Content-Length"])


def _check_status(response: ClientResponse) -> None:
    if response.status in (404, 410):
        raise FileNotFoundError(errno.ENOENT, "No such file", str(response.url))
    if response.status in (401, 403):
        raise PermissionError(f"HTTP status {response.status}")
    response.raise_for_status()
