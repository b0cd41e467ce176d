"""Which files an input list stands for, how they are cut into pieces, and the sentence for everything else."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trine.configs.errors import RunError, UsageError
from trine.data_pipeline.corpus.documents import Document
from trine.data_pipeline.corpus.sources import (
    STANDARD_LIBRARY,
    InputFile,
    Piece,
    describe_skipped,
    divide,
    iter_documents,
    list_files,
    read_piece,
)


def texts(*inputs: object) -> list[str]:
    return [document.text for document in iter_documents([str(given) for given in inputs])]


def only_file(path: Path) -> InputFile:
    (file,) = list_files([str(path)]).files
    return file


def write_each_kind(folder: Path) -> None:
    """One file of each kind, of three documents, and the second file of a text."""
    rows = [f"row {n} of it" for n in range(3)]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    (folder / "1.txt").write_text("a text")
    (folder / "2.txt.gz").write_bytes(gzip.compress(b"a compressed text"))
    (folder / "3.jsonl").write_bytes(lines)
    (folder / "4.jsonl.gz").write_bytes(gzip.compress(lines))
    pq.write_table(pa.table({"text": rows}), folder / "5.parquet", row_group_size=1)


def test_folder_is_walked_in_sorted_order_without_what_is_hidden(tmp_path: Path) -> None:
    for name in (
        "b.txt",
        "a.md",
        "z/1.py",
        "c/2.rst",
        "image.png",
        ".hidden.txt",
        ".git/x.txt",
        "__pycache__/y.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    (tmp_path / "empty.txt").touch()
    assert texts(tmp_path) == ["a.md", "b.txt", "c/2.rst", "z/1.py"]
    listing = list_files([str(tmp_path)])
    assert [os.path.relpath(file.path, tmp_path) for file in listing.files] == [
        "a.md",
        "b.txt",
        "empty.txt",
        "c/2.rst",
        "z/1.py",
    ]
    assert listing.bytes == sum(map(len, texts(tmp_path)))
    assert listing.files[0].mtime_ns == (tmp_path / "a.md").stat().st_mtime_ns


def test_files_of_a_folder_that_are_left_out_are_counted_by_suffix(tmp_path: Path) -> None:
    for name in ("kept.txt", "a.png", "b.png", "c.json.gz", "d.gz", "e.parquet.gz", "Makefile", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe.txt")
    skipped = list_files([str(tmp_path)]).skipped
    assert skipped == {"(no suffix)": 1, ".gz": 1, ".json.gz": 1, ".parquet.gz": 1, ".png": 2, ".txt": 2}
    assert describe_skipped(skipped) == "1 (no suffix), 1 .gz, 1 .json.gz, 1 .parquet.gz, 2 .png, 2 .txt"


def test_linked_folders_are_walked_once_each(tmp_path: Path) -> None:
    lake, elsewhere = tmp_path / "lake", tmp_path / "elsewhere"
    for path in (lake / "v1" / "1.txt", lake / "v2" / "2.txt", elsewhere / "deep" / "3.txt"):
        path.parent.mkdir(parents=True)
        path.write_text(path.stem)
    (lake / "b").symlink_to(elsewhere)
    (lake / "latest").symlink_to("v2")  # the same documents by another name
    (lake / "v1" / "all").symlink_to(lake)  # loops
    (elsewhere / "deep" / "up").symlink_to("..")
    (lake / "v1" / "itself.txt").symlink_to("itself.txt")
    (lake / ".hidden").symlink_to(elsewhere)
    listing = list_files([str(lake)])
    assert [os.path.relpath(file.path, lake) for file in listing.files] == ["b/deep/3.txt", "latest/2.txt", "v1/1.txt"]
    assert describe_skipped(listing.skipped) == "3 (folder that links lead to again), 1 .txt"
    assert texts(lake / "latest", lake / "b") == ["2", "3"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{name}.txt").write_text("read")
    with pytest.raises(UsageError, match=r"caf\\udce9' has a name that is not UTF-8, .*: rename it, or give the"):
        texts(tmp_path / name)
    assert texts(tmp_path) == ["read"]


def test_listing_opens_no_file(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.jsonl.zst", "c.txt.gz"):
        (tmp_path / name).write_bytes(b"not what it is named")
    kinds = {file.path[-3:]: (file.kind, file.bytes) for file in list_files([str(tmp_path)]).files}
    assert kinds == {"uet": ("parquet", 20), "zst": ("json_lines", 20), ".gz": ("text", 20)}


def test_text_file_is_one_document_with_its_line_ends_and_without_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "any.name"
    path.write_bytes("one\r\n\ntw\u00f6".encode("utf-8-sig"))
    (document,) = iter_documents([str(path)])
    assert (document.text, document.source) == ("one\r\n\ntw\u00f6", str(path))


def test_inputs_follow_one_another(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "c.txt").write_text("c")
    assert texts(tmp_path / "b.txt", tmp_path / "c", tmp_path / "a.txt") == ["b", "c", "a"]


def test_standard_library_is_a_corpus_of_its_own() -> None:
    listing = list_files([STANDARD_LIBRARY])
    assert len(listing.files) > 300
    assert 5e6 < listing.bytes < 30e6
    assert listing.skipped == {}
    assert all(file.kind == "library" and file.path.endswith(".py") for file in listing.files)
    (piece,) = divide(listing.files[0], 10)
    (document,) = read_piece(piece)
    assert document.source == listing.files[0].path


def test_a_library_source_that_is_not_utf8_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "latin.py"
    path.write_bytes("# caf\u00e9".encode("latin-1"))
    assert list(read_piece(Piece(InputFile(str(path), 6, 0, "library"), 0, 6, 6))) == []


@pytest.mark.parametrize("piece_bytes", [1, 7, 30, 10_000])
def test_pieces_are_all_documents_in_order_and_all_bytes(tmp_path: Path, piece_bytes: int) -> None:
    write_each_kind(tmp_path)
    files = list_files([str(tmp_path)]).files
    pieces = [divide(file, piece_bytes) for file in files]
    documents = [document for of_file in pieces for piece in of_file for document in read_piece(piece)]
    assert documents == list(iter_documents([str(tmp_path)]))
    assert len(documents) == 1 + 1 + 3 + 3 + 3
    assert [sum(piece.bytes for piece in of_file) for of_file in pieces] == [file.bytes for file in files]
    assert [len(of_file) for of_file in pieces[:2]] == [1, 1]
    assert pieces == [divide(file, piece_bytes) for file in files]


def test_json_lines_are_cut_at_multiples_of_the_size(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_bytes(b"x" * 25)
    assert [(piece.start, piece.stop, piece.bytes) for piece in divide(only_file(path), 10)] == [
        (0, 10, 10),
        (10, 20, 10),
        (20, 25, 5),
    ]
    path.write_bytes(b"")
    assert divide(only_file(path), 10) == []


def test_parquet_is_cut_between_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": [chr(97 + n) * 5 for n in range(6)]}), path, row_group_size=1)
    group = pq.ParquetFile(path).metadata.row_group(0).column(0).total_compressed_size
    spans = [(piece.start, piece.stop) for piece in divide(only_file(path), 2 * group)]
    assert spans == [(0, 2), (2, 4), (4, 6)]
    pq.ParquetWriter(path, pa.schema({"text": pa.string()})).close()
    assert divide(only_file(path), 10) == []


def test_a_piece_travels_between_processes(tmp_path: Path) -> None:
    write_each_kind(tmp_path)
    (piece,) = divide(only_file(tmp_path / "3.jsonl"), 1000)
    assert pickle.loads(pickle.dumps(piece)) == piece
    documents = list(read_piece(piece))
    assert pickle.loads(pickle.dumps(documents)) == documents
    assert documents[0] == Document("row 0 of it", f"{tmp_path / '3.jsonl'}@0")


@pytest.mark.parametrize("given", ["s3://bucket/x", "https://example.com/a.txt", "file:///etc/passwd"])
def test_urls_are_refused(given: str) -> None:
    with pytest.raises(UsageError, match="only local paths are read") as error:
        texts(given)
    assert given in str(error.value)


def test_commands_are_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="input pipe:touch made would run a command, and commands are never run"):
        texts("pipe:touch made")
    assert not Path("made").exists()


def test_a_local_name_with_a_colon_can_still_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes:2024").write_text("kept")
    with pytest.raises(UsageError, match=r"write \./ before"):
        texts("notes:2024")
    assert texts("./notes:2024") == ["kept"]
    pq.write_table(pa.table({"text": ["kept too"]}), "some.parquet")
    Path("some.parquet").rename("s3:x.parquet")
    assert texts("./s3:x.parquet") == ["kept too"]


def test_what_is_not_there_or_empty_is_named_with_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no input was given; accepted is a folder or a file of \.markdown"):
        texts()
    with pytest.raises(UsageError, match=f"input {tmp_path / 'absent'} is not there; accepted is"):
        texts(tmp_path / "absent")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(UsageError, match=rf"input {tmp_path} holds no document \(1 \.png left out\); accepted is"):
        texts(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UsageError, match=f"input {tmp_path} holds no document; accepted is"):
        texts(tmp_path)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("c4.json", r"is JSON, and only JSON Lines are read: write one object in each line of a \.jsonl file"),
        ("c4.json.gz", "is JSON, and only JSON Lines are read"),
        ("dump.zst", r"does not say what it holds: .* for example dump\.jsonl\.zst; accepted is"),
    ],
)
def test_a_file_that_is_named_and_cannot_be_what_was_meant(tmp_path: Path, name: str, complaint: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(UsageError, match=f"input {tmp_path / name} {complaint}"):
        texts(tmp_path / name)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.txt is not UTF-8 text \(byte 3\)"):
        texts(path)


def test_a_file_that_has_gone_is_named(tmp_path: Path) -> None:
    write_each_kind(tmp_path)
    for file in list_files([str(tmp_path)]).files:
        (piece,) = divide(file, 1 << 20)
        os.remove(file.path)
        with pytest.raises(RunError, match=rf"input {file.path} cannot be read \(No such file or directory\)"):
            list(read_piece(piece))


def test_a_file_that_two_inputs_hold_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("once")
    with pytest.raises(UsageError, match=r"input .*a\.txt and input .* both hold .*a\.txt: give it once"):
        list_files([str(tmp_path), str(tmp_path / "a.txt")])
    (tmp_path / "sub").mkdir()
    for again in (tmp_path / "a.txt", tmp_path / "sub" / ".." / "a.txt"):
        with pytest.raises(UsageError, match="give it once"):
            list_files([str(tmp_path / "a.txt"), str(again)])
