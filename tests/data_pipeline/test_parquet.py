"""Parquet: row groups are read on their own, and everything that is no column of strings has its sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trine.configs.errors import UsageError
from trine.data_pipeline.corpus.parquet import read_parquet, row_group_sizes

ROWS = [f"row {n} \u00e9\u4e16" for n in range(300)]


def write(path: Path, rows: object = ROWS, name: str = "text", **options: object) -> str:
    pq.write_table(pa.table({"id": pa.array(range(len(rows))), name: rows}), path, **options)
    return str(path)


def read(path: str, start: int = 0, stop: int | None = None, column: str = "text") -> list[tuple[str, str]]:
    stop = len(row_group_sizes(path)) if stop is None else stop
    return [(d.text, d.source.removeprefix(path)) for d in read_parquet(path, start, stop, column)]


def test_row_groups_are_the_rows_with_their_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "some.parquet", row_group_size=70)
    whole = [(text, f"@{n}") for n, text in enumerate(ROWS)]
    assert read(path) == whole
    assert len(row_group_sizes(path)) == 5
    assert read(path, 1, 3) == whole[70:210]
    assert [found for n in range(5) for found in read(path, n, n + 1)] == whole
    assert read(path, 2, 2) == []


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_every_kind_of_string(kind: pa.DataType, compression: str, tmp_path: Path) -> None:
    path = write(tmp_path / "some.parquet", pa.array(ROWS, pa.string()).cast(kind), compression=compression)
    assert [text for text, _ in read(path)] == ROWS
    assert 0 < sum(row_group_sizes(path)) < Path(path).stat().st_size


def test_empty_and_null_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "some.parquet", ["", None, "a", None, "b"], row_group_size=3)
    assert read(path) == [("a", "@2"), ("b", "@4")]
    assert read(write(tmp_path / "nulls.parquet", pa.array([None, None], pa.string()))) == []


@pytest.mark.parametrize("name", ["content", "a.b", "t\u00e9xt"])
def test_another_column(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "some.parquet", name=name)
    assert [text for text, _ in read(path, column=name)] == ROWS


def test_a_column_that_is_missing_or_of_no_strings(tmp_path: Path) -> None:
    path = write(tmp_path / "some.parquet", name="content")
    with pytest.raises(UsageError) as error:
        read(path)
    assert str(error.value) == (
        f"{path} has no column 'text' (its columns: 'id', 'content'); name the column of the text with --text-field"
    )
    with pytest.raises(UsageError, match=r"some\.parquet has int64 and no strings in the column 'id'; name the column"):
        read(path, column="id")
    nested = write(tmp_path / "nested.parquet", pa.array([{"a": "x"}]))
    with pytest.raises(UsageError, match="has struct<a: string> and no strings in the column 'text'"):
        read(nested)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    bad = pa.array([b"good", b"caf\xe9"], pa.binary()).view(pa.string())
    path = write(tmp_path / "latin.parquet", bad)
    with pytest.raises(UsageError, match=r"latin\.parquet row 1 is not UTF-8 text in the column 'text' \(byte 3\)"):
        read(path)


def test_what_is_not_parquet_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "some.parquet"
    whole = Path(write(path, row_group_size=70)).read_bytes()
    for data in (b"", b"no", b"x" * 1000, whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(UsageError, match=r"some\.parquet is damaged or not a Parquet file \(") as error:
            row_group_sizes(str(path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_damage_within_the_column_is_noticed(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "some.parquet"
    write(path, row_group_size=70, compression=compression, use_dictionary=False, write_page_checksum=True)
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    assert read(str(path), 2, 5)
    with pytest.raises(UsageError, match=r"some\.parquet is damaged or not a Parquet file \(") as error:
        read(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "some.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError) as error:
        row_group_sizes(path)
    assert str(error.value) == (
        f"reading {path} needs the package pyarrow, which is not installed: pip install 'trine[parquet]'"
    )
