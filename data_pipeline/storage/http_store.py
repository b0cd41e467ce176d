"""Files on a web server: range requests, and sizes without a listing."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ...configs.errors import UsageError
from .patience import BadAnswer, patiently

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession, TraceRequestRedirectParams

_CONNECT_SECONDS = 30
_SILENCE_SECONDS = 60
"""How long a server may send nothing before a request counts as failed."""
_HEADS_AT_ONCE = 32
_LARGEST_WHOLE = 1 << 30
"""Bytes of a file that is read whole, a manifest or an index: a server that never ends must not fill the memory."""

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class HttpStore:
    """Files behind http:// and https:// URLs, a ``remote_folder.Store``.

    The proxy of the environment is used, and passwords come from ``.netrc``: a server to which a request is redirected
    gets its own and no other's. Raises ImportError without aiohttp.
    """

    def __init__(self) -> None:
        import aiohttp
        import fsspec

        silence = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
        redirects = aiohttp.TraceConfig()
        redirects.on_request_redirect.append(_refuse_downgrade)
        # A compressed answer has other offsets than the file.
        headers = {"Accept-Encoding": "identity"}
        self._files: Any = fsspec.filesystem(
            "http",
            skip_instance_cache=True,
            client_kwargs={"trust_env": True, "timeout": silence, "headers": headers, "trace_configs": [redirects]},
        )

    def read(self, url: str) -> bytes:
        """A whole file."""
        return self._run(self._read, url)

    def read_range(self, url: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file. Raises UsageError when the server answers with the whole file instead."""
        return self._run(self._read_range, url, start, stop)

    def sizes(self, folder: str, names: Iterable[str]) -> dict[str, int]:
        """Sizes of those of the files that are there, by one HEAD request for each: the web has no listing.

        They are asked for with patience one by one: of thousands, one always fails. Raises RunError for the first that
        does to the end, UsageError when the server does not say how long files are.
        """

        def size(name: str) -> int | None:
            url = f"{folder}/{name}"
            return patiently(url, lambda: self._run(self._size, url))

        names = list(names)
        with ThreadPoolExecutor(_HEADS_AT_ONCE) as threads:
            sizes = list(threads.map(size, names))
        return {name: size for name, size in zip(names, sizes, strict=True) if size is not None}

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
            _check_status(response, 200)
            return await _body(response, _LARGEST_WHOLE)

    async def _read_range(self, url: str, start: int, stop: int) -> bytes:
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        async with (await self._session()).get(url, headers=headers) as response:
            if response.status == 416:  # the file ends before ``start``
                return b""
            # Without the part's own status the whole file would follow, for every sample.
            if response.status == 200:
                raise UsageError(
                    f"the server of {url} cannot send parts of files (no HTTP range requests); "
                    "use another server, or copy the data to a local folder"
                )
            _check_status(response, 206)
            count = _length_of_part(response, start, stop)
            data = await _body(response, count)
            if len(data) < count:
                raise BadAnswer(f"the server sent {len(data)} bytes and announced {count}")
            return data

    async def _size(self, url: str) -> int | None:
        async with (await self._session()).head(url, allow_redirects=True) as response:
            if response.status in (404, 410):
                return None
            _check_status(response, 200)
            length = response.headers.get("Content-Length")
            if length is None:
                raise UsageError(
                    f"the server of {url} does not say how long files are (no Content-Length); "
                    "use another server, or copy the data to a local folder"
                )
            return int(length)


def _check_status(response: ClientResponse, wanted: int) -> None:
    if response.status in (404, 410):
        raise FileNotFoundError(errno.ENOENT, "No such file", str(response.url))
    if response.status in (401, 403):
        raise PermissionError(f"HTTP status {response.status}")
    response.raise_for_status()
    if response.status != wanted:
        raise BadAnswer(f"the server answered with HTTP status {response.status} instead of {wanted}")


def _length_of_part(response: ClientResponse, start: int, stop: int) -> int:
    """Bytes of the part [start, stop) that the server says it sends: fewer only if the file ends with it."""
    said = response.headers.get("Content-Range", "")
    found = _CONTENT_RANGE.fullmatch(said)
    if found is not None:
        first, end = int(found[1]), int(found[2]) + 1
        if first == start < end <= stop and (end == stop or found[3] == str(end)):
            return end - start
    raise BadAnswer(f"the server was asked for bytes {start}-{stop - 1} and sent '{said}'")


async def _body(response: ClientResponse, most: int) -> bytes:
    """The body of an answer. Raises BadAnswer as soon as it is longer than ``most`` bytes."""
    blocks, size = [], 0
    async for block in response.content.iter_any():
        size += len(block)
        if size > most:
            raise BadAnswer(f"the server sent more than the {most} bytes that were to come")
        blocks.append(block)
    return b"".join(blocks)


async def _refuse_downgrade(session: ClientSession, context: object, redirect: TraceRequestRedirectParams) -> None:
    """Raises UsageError for a redirection to another protocol, unless it is from http to https."""
    from yarl import URL

    target = redirect.url.join(URL(redirect.response.headers.get("Location", "")))
    if target.scheme not in ("https", redirect.url.scheme):
        redirect.response.close()
        # Of the target only what cannot be a secret: object stores sign theirs.
        raise UsageError(
            f"{redirect.url} is redirected to {target.scheme}://{target.host or ''}, which is not as safe as "
            f"{redirect.url.scheme}; use the address of another server, or copy the data to a local folder"
        )
