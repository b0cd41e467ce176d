"""Documents out of local files, and the sentence for everything that is not one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from trine.configs.errors import UsageError
from trine.data_pipeline.sources import STANDARD_LIBRARY, iter_documents, take_census


def texts(*inputs: object) -> list[str]:
    return [document.text for document in iter_documents([str(given) for given in inputs])]


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
    assert take_census([str(tmp_path)]) == (5, sum(map(len, texts(tmp_path))))


def test_text_file_is_one_document_with_its_line_ends_and_without_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "any.name"
    path.write_bytes("one\r\n\ntw\u00f6".encode("utf-8-sig"))
    (document,) = iter_documents([str(path)])
    assert (document.text, document.source) == ("one\r\n\ntw\u00f6", str(path))


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(
        json.dumps({"text": "a\nb", "id": 1}) + "\n\n" + json.dumps({"text": ""}) + '\n{"text": "\u00e9"}'
    )
    documents = list(iter_documents([str(path)]))
    assert [(d.text, d.source) for d in documents] == [("a\nb", f"{path}:1"), ("\u00e9", f"{path}:4")]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "cut', "is not valid JSON"),
        ('{"body": "x"}', "a string in the field 'text'"),
        ('{"text": 3}', "a string in the field 'text'"),
        ('["text"]', "a string in the field 'text'"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_bad_json_line_names_file_and_line(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(UsageError, match=complaint) as error:
        texts(path)
    assert f"{path}:2 " in str(error.value)


def test_inputs_follow_one_another(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    assert texts(tmp_path / "b.txt", tmp_path, tmp_path / "b.txt") == ["b", "a", "b", "b"]


def test_standard_library_is_a_corpus_of_its_own() -> None:
    files, size = take_census([STANDARD_LIBRARY])
    assert files > 300
    assert 5e6 < size < 30e6
    first = list(itertools.islice(iter_documents([STANDARD_LIBRARY]), 3))
    assert all(document.text and document.source.endswith(".py") for document in first)
    assert first == list(itertools.islice(iter_documents([STANDARD_LIBRARY]), 3))


@pytest.mark.parametrize(
    "given", ["s3://bucket/x", "https://example.com/a.txt", "pipe:cat x", "file:///etc/passwd"]
)
def test_urls_are_refused(given: str) -> None:
    with pytest.raises(UsageError, match="only local paths are read") as error:
        texts(given)
    assert given in str(error.value)


def test_a_local_name_with_a_colon_can_still_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes:2024").write_text("kept")
    with pytest.raises(UsageError, match=r"write \./ before"):
        texts("notes:2024")
    assert texts("./notes:2024") == ["kept"]


def test_what_is_not_there_or_empty_is_named_with_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no input was given; accepted is a folder with \.jsonl \.markdown"):
        texts()
    with pytest.raises(UsageError, match=f"input {tmp_path / 'absent'} is not there; accepted is"):
        texts(tmp_path / "absent")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(UsageError, match=f"input {tmp_path} holds no document; accepted is"):
        texts(tmp_path)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.txt is not UTF-8 text \(byte 3\)"):
        texts(path)
