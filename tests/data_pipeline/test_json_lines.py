"""JSON Lines: any cut gives the same documents, and a bad line is named by its number in the file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trine.configs.errors import UsageError
from trine.data_pipeline.corpus.documents import Document
from trine.data_pipeline.corpus.json_lines import END, read_json_lines


def line(text: str) -> bytes:
    return json.dumps({"text": text}, ensure_ascii=False).encode("utf-8")


def write(path: Path, data: bytes) -> str:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def read(path: str, start: int = 0, stop: int = END, field: str = "text") -> list[Document]:
    return list(read_json_lines(path, start, stop, field))


LAYOUTS = {
    "plain": line("one") + b"\n" + line("two \u00e9\u4e16") + b"\n" + line("three") + b"\n",
    "without a final newline": line("one") + b"\n" + line("two"),
    "CRLF": line("one") + b"\r\n" + line("two") + b"\r\n",
    "blank lines": b"\n\n" + line("one") + b"\n\n \t\n\r\n" + line("two") + b"\n\n",
    "a long line": line("a") + b"\n" + line("b" * 100) + b"\n" + line("c") + b"\n",
    "a byte order mark": b"\xef\xbb\xbf" + line("one") + b"\n" + line("two") + b"\n",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_pieces_cut_at_any_byte_are_the_whole(layout: str, tmp_path: Path) -> None:
    data = LAYOUTS[layout]
    path = write(tmp_path / "some.jsonl", data)
    whole = read(path)
    # One per line that is not blank: no document is lost, and none is read twice.
    assert len(whole) == sum(bool(found.strip()) for found in data.split(b"\n"))
    for cut in range(len(data) + 1):
        assert read(path, 0, cut) + read(path, cut, len(data)) == whole


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 20, 64])
def test_pieces_of_any_size_are_the_whole(layout: str, size: int, tmp_path: Path) -> None:
    data = LAYOUTS[layout]
    path = write(tmp_path / "some.jsonl", data)
    starts = range(0, len(data), size)
    pieces = [read(path, start, min(start + size, len(data))) for start in starts]
    assert [document for piece in pieces for document in piece] == read(path)
    for start, piece in zip(starts, pieces, strict=True):
        for document in piece:
            assert start <= int(document.source.rpartition("@")[2]) < start + size


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=12), max_size=8), size=st.integers(4, 60))
def test_any_texts_survive_any_cut(texts: list[str], size: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    path = write(tmp_path_factory.mktemp("any") / "some.jsonl", data)
    found = [document for start in range(0, len(data), size) for document in read(path, start, start + size)]
    assert [document.text for document in found] == texts


def test_a_compressed_file_has_the_documents_of_the_plain_one(tmp_path: Path) -> None:
    data = LAYOUTS["a byte order mark"]
    plain, packed = write(tmp_path / "some.jsonl", data), write(tmp_path / "some.jsonl.gz", data)
    assert [(d.text, d.source) for d in read(packed)] == [
        (d.text, d.source.replace(".jsonl", ".jsonl.gz")) for d in read(plain)
    ]


def test_empty_and_null_texts_are_left_out_and_another_field_can_be_named(tmp_path: Path) -> None:
    records = [{"text": "", "body": "b1"}, {"text": None, "body": "b2"}, {"text": "t3", "body": None}]
    path = write(tmp_path / "some.jsonl", b"\n".join(json.dumps(record).encode() for record in records))
    assert [document.text for document in read(path)] == ["t3"]
    assert [document.text for document in read(path, field="body")] == ["b1", "b2"]


BAD = [
    (b'{"text": "cut', r"is not valid JSON \(Unterminated string starting at column 10\); each line must be one"),
    (b'{"body": "x", "id": 1}', r"has no field 'text' \(its fields: 'body', 'id'\); name .* with --text-field"),
    (b"{}", r"has no field 'text' \(its fields: none at all\)"),
    (b'{"text": 3}', "has a number and no string in the field 'text'; correct or remove the line, or name another"),
    (b'{"text": ["x"]}', "has a list and no string in the field 'text'"),
    (b'["text"]', "is not a JSON object; each line must be one"),
    (b'{"text": "\\ud800"}', r"has half of a surrogate pair in the field 'text' \(character 0\); remove it"),
    (b'{"text": "caf\xe9"}', r"is not UTF-8 text \(byte 13 of the line\); convert the file to UTF-8"),
    (b"[" * 100_000, "is not valid JSON"),
    (b'{"text": ' + b"1" * 5000 + b"}", "is not valid JSON"),
]


@pytest.mark.parametrize("name", ["bad.jsonl", "bad.jsonl.gz"])
@pytest.mark.parametrize(("bad", "complaint"), BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named_by_file_and_number(name: str, bad: bytes, complaint: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, line("good") + b"\n\n" + bad + b"\n" + line("good") + b"\n")
    with pytest.raises(UsageError, match=complaint) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:3 ")


def test_a_bad_line_in_a_piece_from_the_middle_has_its_number_in_the_file(tmp_path: Path) -> None:
    good = line("good") + b"\n"
    path = write(tmp_path / "bad.jsonl", good * 999 + b"bad\n" + good)
    with pytest.raises(UsageError, match=r"bad\.jsonl:1000 is not valid JSON \(Expecting value at column 1\)"):
        read(path, len(good) * 500 + 3)
