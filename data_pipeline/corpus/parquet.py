"""Parquet: a column of strings, one document in each row, read by row groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...configs.errors import UsageError
from ..extras import missing_package
from .documents import Document

if TYPE_CHECKING:
    from pyarrow import DataType, Scalar
    from pyarrow.parquet import ParquetFile

_ROWS_AT_ONCE = 128
_READ_AT_ONCE = 1 << 20


def row_group_sizes(path: str) -> list[int]:
    """Compressed bytes of each row group, from the file's footer. Raises UsageError when it is not Parquet."""
    with _open(path) as file:
        groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
        return [sum(group.column(n).total_compressed_size for n in range(group.num_columns)) for group in groups]


def read_parquet(path: str, start: int, stop: int, column: str) -> Iterator[Document]:
    """Documents of the row groups ``start`` to ``stop - 1``, in order; empty and null texts are left out.

    Memory is bounded by 128 rows and a row group's dictionary. Raises UsageError when the file is damaged, has no such
    column or one that is not of strings, holds text that is not UTF-8, or when pyarrow is missing.
    """
    with _open(path) as file:
        _check_column(path, file, column)
        row = sum(file.metadata.row_group(number).num_rows for number in range(start))
        batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=range(start, stop), columns=[column], use_threads=False)
        for batch in batches:
            for value in batch.column(0):
                text = _text(value, f"{path} row {row}", column)
                if text:
                    yield Document(text, f"{path}@{row}")
                row += 1


@contextmanager
def _open(path: str) -> Iterator[ParquetFile]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise missing_package(f"reading {path}", "pyarrow", "parquet") from error
    with open(path, "rb") as raw:
        try:
            # Without pre_buffer and with a buffer of its own, a column is read as it is decoded and not before.
            yield ParquetFile(raw, pre_buffer=False, buffer_size=_READ_AT_ONCE, page_checksum_verification=True)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise UsageError(
                f"{path} is damaged or not a Parquet file ({reason}); fetch it again or leave it out"
            ) from error


def _check_column(path: str, file: ParquetFile, column: str) -> None:
    names = file.schema_arrow.names
    if column not in names:
        raise UsageError(
            f"{path} has no column {column!r} (its columns: {', '.join(map(repr, names)) or 'none at all'}); "
            "name the column of the text with --text-field"
        )
    kind = file.schema_arrow.types[names.index(column)]
    if not _is_text(kind):
        raise UsageError(
            f"{path} has {kind} and no strings in the column {column!r}; name the column of the text with --text-field"
        )


def _is_text(kind: DataType) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _text(value: Scalar, where: str, column: str) -> str | None:
    try:
        text: str | None = value.as_py()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where} is not UTF-8 text in the column {column!r} (byte {error.start}); correct or remove the row"
        ) from error
    return text
