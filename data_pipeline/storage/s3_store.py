"""Files in an S3 store, of Amazon or of others that speak its protocol."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any

from .patience import BadAnswer


class S3Store:
    """Files behind s3:// URLs, a ``remote_folder.Store``.

    Credentials, region and endpoint come from where every AWS client takes them: ``AWS_ACCESS_KEY_ID``,
    ``AWS_ENDPOINT_URL``, ``~/.aws``, the machine's role. ``FSSPEC_S3_ANON=true`` reads public buckets without any.
    Raises ImportError without s3fs.
    """

    def __init__(self) -> None:
        import s3fs

        self._files: Any = s3fs.S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            # The attempts are counted by the caller: those of three libraries would multiply.
            config_kwargs={"retries": {"total_max_attempts": 1}},
        )
        self._files.retries = 1

    def read(self, url: str) -> bytes:
        """A whole file."""
        data: bytes = self._files.cat_file(url)
        return data

    def read_range(self, url: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, fewer when it ends before."""
        try:
            data: bytes = self._files.cat_file(url, start=start, end=stop)
        except OSError as error:
            if _begins_after_the_end(error):
                return b""
            raise
        if len(data) > stop - start:
            raise BadAnswer(f"the server was asked for {stop - start} bytes and sent {len(data)}")
        return data

    def sizes(self, folder: str, names: Iterable[str]) -> dict[str, int]:
        """Sizes of those of the files that are there, by one listing."""
        wanted = set(names)
        entries = ((entry["name"].rsplit("/", 1)[-1], entry["size"]) for entry in self._files.ls(folder, detail=True))
        return {name: size for name, size in entries if name in wanted}


def _begins_after_the_end(error: OSError) -> bool:
    response = getattr(error.__cause__, "response", None) or {}
    return error.errno == errno.EINVAL and response.get("Error", {}).get("Code") == "InvalidRange"
