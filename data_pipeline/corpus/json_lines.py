"""JSON Lines: one JSON object in each line, with a document's text in one of its fields.

A file is cut at any byte: a line belongs to the piece in which its first byte lies. So pieces are read independently,
and a cut needs no look at the file.
"""

from __future__ import annotations

import json
import sys
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Any, BinaryIO

from ...configs.errors import UsageError
from .compressed import open_input
from .documents import Document

END = sys.maxsize
"""As ``stop``: up to the end of the file."""

_BLOCK = 1 << 20
_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def read_json_lines(path: str, start: int, stop: int, field: str) -> Iterator[Document]:
    """Documents of the lines whose first byte is one of ``start`` to ``stop - 1``; empty and null texts are left out.

    The bytes are those of the text, which in a compressed file are not at hand: there ``start`` is 0 and ``stop`` is
    END. Raises UsageError, with the number of the line in the file, for a line that is not a JSON object with a string
    in ``field``.
    """
    with open_input(path) as file:
        for offset, line in _lines(file, start, stop):
            try:
                text = _text_of(line, field)
            except ValueError as error:
                raise UsageError(f"{path}:{_line_number(path, offset)} {error}") from error
            if text:
                yield Document(text, f"{path}@{offset}")


def _lines(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, each with the offset of its first byte."""
    if start:
        # The byte before shows whether a line begins at start. No more than the piece is searched for its first line,
        # or a line as long as many pieces would be read once for each.
        file.seek(start - 1)
        skipped = file.readline(stop - start)
        if not skipped.endswith(b"\n"):
            return
        start += len(skipped) - 1
    while start < stop and (line := file.readline()):
        offset, start = start, start + len(line)
        if not offset:
            line = line.removeprefix(BOM_UTF8)
        if line.strip():
            yield offset, line


def _text_of(line: bytes, field: str) -> str | None:
    """The text of a line. Raises ValueError with the rest of a sentence that begins with the line's place."""
    record = _parse(line)
    if not isinstance(record, dict):
        raise ValueError("is not a JSON object; each line must be one")
    if field not in record:
        names = ", ".join(map(repr, record)) or "none at all"
        raise ValueError(f"has no field {field!r} (its fields: {names}); name the field of the text with --text-field")
    text = record[field]
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(
            f"has {_KINDS[type(text)]} and no string in the field {field!r}; "
            "correct or remove the line, or name another field with --text-field"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"has half of a surrogate pair in the field {field!r} (character {error.start}); remove it"
        ) from error
    return text


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.rstrip().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start} of the line); convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise ValueError(f"is not valid JSON ({reason}); each line must be one JSON object") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({error}); each line must be one JSON object") from error


def _line_number(path: str, offset: int) -> int:
    """Number in the file, from 1, of the line that begins at ``offset``: counted only for a message."""
    number = 1
    with open_input(path) as file:
        while block := file.read(min(_BLOCK, offset)):
            number += block.count(b"\n")
            offset -= len(block)
    return number
