"""The plan: every piece once and in order, in chunks of about the size asked for, whoever asks."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trine.configs.errors import UsageError
from trine.data_pipeline.corpus.sources import InputFile, divide, iter_documents, list_files, read_piece
from trine.data_pipeline.preparation.chunks import (
    LARGEST_CHUNK,
    SMALLEST_CHUNK,
    default_chunk_bytes,
    inputs_sha256,
    plan_chunks,
)


@given(sizes=st.lists(st.integers(0, 500), max_size=40), chunk_bytes=st.integers(1, 300))
def test_chunks_hold_every_piece_in_order(sizes: list[int], chunk_bytes: int) -> None:
    kinds = ("text", "json_lines")
    files = [InputFile(f"{n}", size, 0, kinds[n % 2]) for n, size in enumerate(sizes)]  # type: ignore[arg-type]
    chunks = plan_chunks(files, chunk_bytes)
    pieces = [piece for file in files for piece in divide(file, chunk_bytes)]
    assert [piece for chunk in chunks for piece in chunk.pieces] == pieces
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    assert all(chunk.pieces for chunk in chunks)
    assert sum(chunk.bytes for chunk in chunks) == sum(sizes)
    largest_text = max((file.bytes for file in files if file.kind == "text"), default=0)
    assert all(chunk.bytes < chunk_bytes + max(chunk_bytes, largest_text) + 1 for chunk in chunks)


@pytest.mark.parametrize("chunk_bytes", [1, 7, 100, 10_000])
def test_documents_are_the_same_whatever_the_chunks(tmp_path: Path, chunk_bytes: int) -> None:
    (tmp_path / "a.txt").write_text("one document of its own " * 9)
    lines = [json.dumps({"text": f"line {n} " * n}) for n in range(1, 30)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    whole = list(iter_documents([str(tmp_path)]))
    chunks = plan_chunks(list_files([str(tmp_path)]).files, chunk_bytes)
    assert [document for chunk in chunks for piece in chunk.pieces for document in read_piece(piece)] == whole


def test_parquet_files_are_planned_in_their_places(tmp_path: Path) -> None:
    for n in range(40):
        if n % 3:
            pq.write_table(pa.table({"text": [f"{n} {row}" for row in range(3)]}), tmp_path / f"{n:02d}.parquet")
        else:
            (tmp_path / f"{n:02d}.txt").write_text(f"{n}")
    files = list_files([str(tmp_path)]).files
    twice = [*files, *files]
    pieces = [piece for chunk in plan_chunks(twice, 1000) for piece in chunk.pieces]
    assert pieces == [piece for file in twice for piece in divide(file, 1000)]
    for n in (22, 13):
        (tmp_path / f"{n}.parquet").write_bytes(b"none")
    with pytest.raises(UsageError, match=r"13\.parquet is damaged or not a Parquet file"):
        plan_chunks(files, 1000)


def test_default_sizes_have_bounds() -> None:
    assert default_chunk_bytes(0) == default_chunk_bytes(SMALLEST_CHUNK) == SMALLEST_CHUNK
    assert default_chunk_bytes(10 << 30) == 40 << 20
    assert default_chunk_bytes(4 << 40) == LARGEST_CHUNK


def test_identity_is_of_names_sizes_and_times() -> None:
    file = InputFile("a", 1, 2, "text")
    others = [InputFile("b", 1, 2, "text"), InputFile("a", 2, 2, "text"), InputFile("a", 1, 3, "text")]
    assert len({inputs_sha256(files) for files in ([], [file], [file, file], *([other] for other in others))}) == 6
