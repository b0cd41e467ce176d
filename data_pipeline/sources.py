"""Documents out of local files: folders, text files, JSON Lines, and Python's own standard library."""

from __future__ import annotations

import json
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..configs.errors import UsageError

STANDARD_LIBRARY = "stdlib"
"""The input that stands for the .py sources of the running interpreter: a corpus that every machine has."""

JSON_LINES = ".jsonl"
TEXT_SUFFIXES = frozenset({".md", ".markdown", ".py", ".rst", ".tex", ".text", ".txt"})
ACCEPTED = (
    f"a folder with {' '.join(sorted(TEXT_SUFFIXES | {JSON_LINES}))} files, one text file, "
    f"a {JSON_LINES} file with a field 'text', or the word {STANDARD_LIBRARY}"
)

# Tests are more than half of the standard library and mostly tables of numbers and strings.
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
# Two letters at least, so that a drive such as C: stays a path.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and where it comes from: ``path`` or, in JSON Lines, ``path:line``."""

    text: str
    source: str


class Census(NamedTuple):
    """How much an input list holds, found without reading it."""

    files: int
    bytes: int


def iter_documents(inputs: Sequence[str]) -> Iterator[Document]:
    """All non-empty documents of ``inputs``, one at a time and always in the same order.

    A folder is walked recursively in sorted order, without hidden entries. Line ends are kept as they are.
    Files are UTF-8; one that is not is an error, except in the standard library, where it is left out. Raises
    UsageError for an input that is not there, is not local, is not readable as text or holds no document.
    """
    _require_inputs(inputs)
    for given in inputs:
        found = False
        for document in _documents_of(given):
            found = True
            yield document
        if not found:
            raise UsageError(f"input {given} holds no document; accepted is {ACCEPTED}")


def take_census(inputs: Sequence[str]) -> Census:
    """Number and total size of the files that ``iter_documents`` would read. Raises UsageError as it does."""
    _require_inputs(inputs)
    sizes = [path.stat().st_size for given in inputs for path in _files(given)]
    return Census(len(sizes), sum(sizes))


def _require_inputs(inputs: Sequence[str]) -> None:
    if not inputs:
        raise UsageError(f"no input was given; accepted is {ACCEPTED}")


def _documents_of(given: str) -> Iterator[Document]:
    for path in _files(given):
        if path.suffix == JSON_LINES:
            yield from _json_lines(path)
        else:
            text = _read_text(path, skip_undecodable=given == STANDARD_LIBRARY)
            if text:
                yield Document(text, str(path))


def _files(given: str) -> Iterator[Path]:
    if given == STANDARD_LIBRARY:
        yield from _walk(Path(sysconfig.get_path("stdlib")), frozenset({".py"}), _NOT_LIBRARY)
        return
    if _SCHEME.match(given):
        raise UsageError(
            f"input {given} looks like a URL, and only local paths are read: copy the data to this machine "
            "first, or write ./ before the name of a local file that holds a colon"
        )
    path = Path(given)
    if path.is_dir():
        yield from _walk(path, TEXT_SUFFIXES | {JSON_LINES}, frozenset())
    elif path.is_file():
        yield path
    else:
        raise UsageError(f"input {given} is not there; accepted is {ACCEPTED}")


def _walk(folder: Path, suffixes: frozenset[str], left_out: frozenset[str]) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        # os.walk descends into what is left in this very list, in its order.
        folders[:] = sorted(
            name
            for name in folders
            if name not in left_out and name != "__pycache__" and not name.startswith(".")
        )
        for name in sorted(names):
            path = Path(root, name)
            if path.suffix in suffixes and not name.startswith(".") and path.is_file():
                yield path


def _read_text(path: Path, *, skip_undecodable: bool) -> str | None:
    try:
        # utf-8-sig drops the byte order mark that some editors write and no model should learn.
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if skip_undecodable:
            return None
        raise UsageError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8 or leave it out"
        ) from error


def _json_lines(path: Path) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            text = _text_of(line, f"{path}:{number}")
            if text:
                yield Document(text, f"{path}:{number}")


def _text_of(line: bytes, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not valid JSON ({error}); each line must be one JSON object") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UsageError(
            f"{where} is not an object with a string in the field 'text'; correct or remove the line"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where} has half of a surrogate pair in the field 'text' (character {error.start}); remove it"
        ) from error
    return text
