"""Input files as streams of bytes, decompressed on the way when their name ends in .gz or .zst."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from ...configs.errors import UsageError
from ..extras import missing_package

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

GZIP = ".gz"
ZSTANDARD = ".zst"
COMPRESSED_SUFFIXES = (GZIP, ZSTANDARD)

_BUFFER = 1 << 18
# zstd --long=31, the most that the format's tool writes, is usual among published corpora.
_LARGEST_WINDOW = 1 << 31


def is_compressed(path: str) -> bool:
    """Whether the contents of a file of that name are decompressed as they are read."""
    return path.endswith(COMPRESSED_SUFFIXES)


@contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    """Open a file for reading bytes from its beginning, in memory bounded by what the caller reads at once.

    Several gzip members or zstd frames one after another are one text. A file that is not compressed can be sought.
    Raises UsageError when the compressed data are damaged or end too early, or a package for them is missing.
    """
    with open(path, "rb") as raw:
        if not is_compressed(path):
            yield raw
            return
        damage: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile, *_zstandard_errors(path))
        try:
            # Cut short at its very beginning, which gzip takes for a file without members.
            if not os.fstat(raw.fileno()).st_size:
                raise EOFError("the file is empty")
            yield _decompressed(path, raw)
        except damage as error:
            raise UsageError(
                f"{path} is damaged or cut short near byte {raw.tell()} ({error}); fetch it again or leave it out"
            ) from error


def _zstandard_errors(path: str) -> tuple[type[Exception], ...]:
    if not path.endswith(ZSTANDARD):
        return ()
    try:
        from zstandard import ZstdError
    except ImportError as error:
        raise missing_package(f"reading {path}", "zstandard", "zstd") from error
    return (ZstdError,)


def _decompressed(path: str, raw: BinaryIO) -> BinaryIO:
    if path.endswith(GZIP):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw, mode="rb"), _BUFFER)
    return io.BufferedReader(_ZstandardStream(raw), _BUFFER)


class _ZstandardStream(io.RawIOBase):
    """The text of all zstd frames of a file.

    The package's own stream reader takes a frame that is cut short for a finished one and loses its text silently.
    """

    def __init__(self, raw: BinaryIO) -> None:
        from zstandard import ZstdDecompressor

        self._raw = raw
        self._decompressor = ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame = self._decompressor.decompressobj()
        self._inside = False
        self._compressed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill ``buffer`` as far as is at hand; 0 at the end. Raises EOFError when the last frame has none."""
        while not self._text:
            self._compressed = self._compressed or self._raw.read(_BUFFER)
            if not self._compressed:
                if self._inside:
                    raise EOFError("the last frame has no end")
                return 0
            self._decompress()
        target = memoryview(buffer).cast("B")
        size = min(len(target), len(self._text))
        target[:size] = self._text[:size]
        self._text = self._text[size:]
        return size

    def _decompress(self) -> None:
        self._text = memoryview(self._frame.decompress(self._compressed))
        self._inside = not self._frame.eof
        self._compressed = self._frame.unused_data
        if self._frame.eof:
            self._frame = self._decompressor.decompressobj()
