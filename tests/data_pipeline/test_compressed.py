"""Compressed inputs: every member and frame is read, and no damage or cut goes unnoticed."""

from __future__ import annotations

import gzip
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from trine.configs.errors import UsageError
from trine.data_pipeline.corpus.compressed import open_input

TEXT = b"".join(b"%d: a line of text\n" % n for n in range(20_000))
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
SUFFIXES = list(COMPRESS)


def read(path: Path) -> bytes:
    with open_input(str(path)) as file:
        return file.read()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_members_and_frames_follow_one_another(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"some.txt{suffix}"
    parts = [TEXT, b"", b"short\n", TEXT[:1000], *[b"tiny\n"] * 500]
    path.write_bytes(b"".join(map(COMPRESS[suffix], parts)))
    assert read(path) == b"".join(parts)
    with open_input(str(path)) as file:
        assert list(file) == b"".join(parts).splitlines(keepends=True)


def test_a_frame_that_is_to_be_skipped_is(tmp_path: Path) -> None:
    path = tmp_path / "some.zst"
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    path.write_bytes(skippable + COMPRESS[".zst"](TEXT) + skippable + COMPRESS[".zst"](b"end") + skippable)
    assert read(path) == TEXT + b"end"


def test_a_long_window_is_read(tmp_path: Path) -> None:
    path = tmp_path / "some.zst"
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    # Without the size in the header the reader must provide for the whole window, which by default it refuses.
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(compressor.compress(TEXT) + compressor.flush())
    assert read(path) == TEXT


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_cut_is_noticed(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"some.txt{suffix}"
    whole = COMPRESS[suffix](TEXT[:300])
    for data in (whole, whole + whole):
        for size in range(len(data)):
            path.write_bytes(data[:size])
            if size == len(whole):
                assert read(path) == TEXT[:300]
            else:
                with pytest.raises(UsageError, match=rf"some\.txt{suffix} is damaged or cut short near byte {size} \("):
                    read(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damage_is_noticed(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"some.txt{suffix}"
    whole = COMPRESS[suffix](TEXT[:300])
    # Neither format protects its whole header: the text that comes out must be right, or an error.
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert read(path) == TEXT[:300]
        except UsageError as error:
            assert "is damaged or cut short near byte" in str(error)
            assert "\n" not in str(error)
    path.write_bytes(TEXT)
    with pytest.raises(UsageError, match="is damaged or cut short"):
        read(path)
    path.write_bytes(whole + b"garbage that follows")
    with pytest.raises(UsageError, match="is damaged or cut short"):
        read(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_memory_does_not_grow_with_the_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"some.txt{suffix}"
    # Hexadecimal of random bytes is compressed to about a half, so the stream is long in both forms.
    text = np.random.default_rng(0).bytes(1 << 22).hex().encode()
    path.write_bytes(COMPRESS[suffix](text))
    tracemalloc.start()
    with open_input(str(path)) as file:
        size = sum(map(len, iter(lambda: file.read(1 << 16), b"")))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == len(text)
    assert peak < len(text) / 4


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.jsonl.zst"
    path.write_bytes(COMPRESS[".zst"](TEXT))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UsageError) as error:
        read(path)
    assert str(error.value) == (
        f"reading {path} needs the package zstandard, which is not installed: pip install 'trine[zstd]'"
    )
