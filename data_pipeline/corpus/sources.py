"""The corpus: which files an input list stands for, and their documents, in pieces that are read independently.

The order of documents is a function of the inputs alone: files in the order of ``list_files``, pieces in that of
``divide``, documents in that of ``read_piece``. Any process can read any piece.
"""

from __future__ import annotations

import errno
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Literal

from ...configs.errors import RunError, UsageError
from ...configs.locations import scheme_of
from .compressed import COMPRESSED_SUFFIXES, is_compressed
from .documents import Document
from .json_lines import END, read_json_lines
from .parquet import read_parquet, row_group_sizes
from .text_files import read_text_file

STANDARD_LIBRARY = "stdlib"
"""The input that stands for the .py sources of the running interpreter: a corpus that every machine has."""

Kind = Literal["text", "library", "json_lines", "parquet"]
"""How a file is read; ``library`` is a source of the standard library, left out when it is not UTF-8."""

JSON_LINES = ".jsonl"
PARQUET = ".parquet"
TEXT_SUFFIXES = frozenset({".md", ".markdown", ".py", ".rst", ".tex", ".text", ".txt"})
ACCEPTED = (
    f"a folder or a file of {' '.join(sorted(TEXT_SUFFIXES))} (one document each) or {JSON_LINES} (one in each line), "
    f"all of them also with {' or '.join(COMPRESSED_SUFFIXES)}, or {PARQUET}, or the word {STANDARD_LIBRARY}"
)

_NO_SUFFIX = "(no suffix)"
_SEEN_FOLDER = "(folder that links lead to again)"
# Tests are more than half of the standard library and mostly tables of numbers and strings.
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of the corpus, as it was when it was listed."""

    path: str
    bytes: int
    mtime_ns: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of an input list in their order, and how many other entries were left out, by suffix."""

    files: tuple[InputFile, ...]
    skipped: dict[str, int]

    @property
    def bytes(self) -> int:
        """Total size of the files."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Piece:
    """What to read of a file: bytes ``start`` to ``stop - 1`` or, in Parquet, row groups."""

    file: InputFile
    start: int
    stop: int
    bytes: int
    """Its share of the file's size: those of a file's pieces add up to it."""


def list_files(inputs: Sequence[str]) -> Listing:
    """The files that ``inputs`` stand for, found without opening them.

    Inputs follow one another. A folder is walked recursively in sorted order, through links too, without hidden
    entries. Left out and counted are files whose suffix is not accepted, and folders that were walked before by another
    name, so that links can neither form a loop nor repeat documents. Raises UsageError for an input that is not there,
    is not local, cannot be read as it is named, has a name that is not UTF-8, holds no file, or holds one that an
    earlier input holds.
    """
    if not inputs:
        raise UsageError(f"no input was given; accepted is {ACCEPTED}")
    files: list[InputFile] = []
    skipped: Counter[str] = Counter()
    holders: dict[str, str] = {}
    for given in inputs:
        found, left_out = _list(given)
        _check_given_once(given, found, holders)
        if not found:
            others = f" ({describe_skipped(left_out)} left out)" if left_out else ""
            raise UsageError(f"input {given} holds no document{others}; accepted is {ACCEPTED}")
        files += found
        skipped += left_out
    return Listing(tuple(files), dict(sorted(skipped.items())))


def _check_given_once(given: str, files: Sequence[InputFile], holders: dict[str, str]) -> None:
    """``holders`` names the input of each absolute path so far, and gets those of ``files``."""
    for file in files:
        path = os.path.abspath(file.path)
        if path in holders:
            raise UsageError(
                f"input {given} and input {holders[path]} both hold {file.path}: give it once (what is to be read more "
                "often has a weight of its own in data.sources)"
            )
        holders[path] = given


def is_utf8(name: str) -> bool:
    """Whether a word of the command line was UTF-8: Python holds the bytes of others as halves of surrogate pairs."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def canonical(given: str) -> str:
    """The name of an input without the slashes at its end, which mean nothing; the folder ``stdlib/`` keeps them."""
    stripped = given.rstrip(os.sep)
    return given if stripped in ("", STANDARD_LIBRARY) else stripped


def describe_skipped(skipped: dict[str, int]) -> str:
    """What a listing left out, in words: ``3 .png, 1 .zip``."""
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(skipped.items()))


def divide(file: InputFile, piece_bytes: int) -> list[Piece]:
    """Cut a file into consecutive pieces of about ``piece_bytes``: a function of the file alone.

    JSON Lines are cut at multiples of ``piece_bytes`` and Parquet between row groups; text files and compressed files
    are one piece. Raises UsageError for a Parquet file that is none, or when pyarrow is missing.
    """
    if file.kind == "parquet":
        return _row_group_pieces(file, piece_bytes)
    if file.kind != "json_lines" or is_compressed(file.path):
        return [Piece(file, 0, file.bytes, file.bytes)]
    cuts = [*range(0, file.bytes, piece_bytes), file.bytes]
    return [Piece(file, start, stop, stop - start) for start, stop in pairwise(cuts)]


def read_piece(piece: Piece, text_field: str = "text") -> Iterator[Document]:
    """The documents of a piece that are not empty, in order; ``text_field`` is the JSON field or Parquet column.

    Raises UsageError for contents that cannot be read as what they are named, with the place in the file, and RunError
    when the file is gone or the disk fails.
    """
    path = piece.file.path
    try:
        if piece.file.kind == "parquet":
            yield from read_parquet(path, piece.start, piece.stop, text_field)
        elif piece.file.kind == "json_lines":
            yield from read_json_lines(path, piece.start, END if is_compressed(path) else piece.stop, text_field)
        else:
            yield from read_text_file(path, skip_undecodable=piece.file.kind == "library")
    except OSError as error:
        raise RunError(
            f"input {path} cannot be read ({error.strerror or error}); give this user access to it or leave it out"
        ) from error


def iter_documents(inputs: Sequence[str], text_field: str = "text") -> Iterator[Document]:
    """All documents of ``inputs`` that are not empty, one at a time and always in the same order.

    Raises as ``list_files``, ``divide`` and ``read_piece`` do, and UsageError when there is no document at all.
    """
    found = False
    for file in list_files(inputs).files:
        for piece in divide(file, max(file.bytes, 1)):
            for document in read_piece(piece, text_field):
                found = True
                yield document
    if not found:
        raise UsageError(f"input {' '.join(inputs)} holds no document; accepted is {ACCEPTED}")


def _list(given: str) -> tuple[list[InputFile], Counter[str]]:
    if given == STANDARD_LIBRARY:
        files, _ = _walk(sysconfig.get_path("stdlib"), _NOT_LIBRARY)
        return [
            InputFile(file.path, file.bytes, file.mtime_ns, "library") for file in files if file.path.endswith(".py")
        ], Counter()
    _check_name(given)
    _check_local(given)
    if os.path.isdir(given):
        return _walk(given, frozenset())
    if os.path.isfile(given):
        status = os.stat(given)
        return [InputFile(given, status.st_size, status.st_mtime_ns, _kind_of_named(given))], Counter()
    raise UsageError(f"input {given} is not there; accepted is {ACCEPTED}")


def _check_name(given: str) -> None:
    if not is_utf8(given):
        raise UsageError(
            f"input {given!r} has a name that is not UTF-8, which the manifest cannot hold: rename it, or give the "
            "folder that it lies in"
        )


def _check_local(given: str) -> None:
    scheme = scheme_of(given)
    if scheme == "pipe":
        raise UsageError(
            f"input {given} would run a command, and commands are never run: "
            "run it yourself and give the file that it writes"
        )
    if scheme:
        raise UsageError(
            f"input {given} looks like a URL, and only local paths are read: copy the data to this machine "
            "first, or write ./ before the name of a local file that holds a colon"
        )


def _walk(folder: str, left_out: frozenset[str]) -> tuple[list[InputFile], Counter[str]]:
    files: list[InputFile] = []
    skipped: Counter[str] = Counter()
    walked = {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        wanted = sorted(
            name for name in folders if name not in left_out and name != "__pycache__" and not name.startswith(".")
        )
        # os.walk descends into what is left in this very list, in its order.
        folders[:] = [name for name in wanted if _is_new(os.path.join(root, name), walked)]
        if len(folders) < len(wanted):
            skipped[_SEEN_FOLDER] += len(wanted) - len(folders)
        for name in sorted(names):
            if name.startswith("."):
                continue
            kind, path = _kind_of(name), os.path.join(root, name)
            status = _status(path) if kind else None
            if kind and status:
                files.append(InputFile(path, status.st_size, status.st_mtime_ns, kind))
            else:
                skipped[_suffix(name)] += 1
    return files, skipped


def _is_new(folder: str, walked: set[str]) -> bool:
    """Whether no other name of ``folder`` is in ``walked``, to which it is added."""
    place = os.path.realpath(folder)
    if place in walked:
        return False
    walked.add(place)
    return True


def _refuse_folder(error: OSError) -> None:
    raise UsageError(
        f"folder {error.filename} cannot be read ({error.strerror}); give this user access to it or leave it out"
    ) from error


def _status(path: str) -> os.stat_result | None:
    """The status of a file, or None for a link to nowhere and what is not a regular file."""
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise UsageError(
            f"file {path} cannot be read ({error.strerror}); give this user access to it or leave it out"
        ) from error
    return status if stat.S_ISREG(status.st_mode) else None


def _kind_of(name: str) -> Kind | None:
    suffix = _uncompressed_suffix(name)
    if suffix in TEXT_SUFFIXES:
        return "text"
    if suffix == JSON_LINES:
        return "json_lines"
    return "parquet" if name.endswith(PARQUET) else None


def _kind_of_named(path: str) -> Kind:
    """A file that is named itself is text, whatever its suffix, unless that says otherwise."""
    name = os.path.basename(path)
    kind = _kind_of(name)
    if kind is None and _uncompressed_suffix(name) == ".json":
        raise UsageError(
            f"input {path} is JSON, and only JSON Lines are read: write one object in each line of a {JSON_LINES} file"
        )
    if kind is None and is_compressed(name):
        raise UsageError(
            f"input {path} does not say what it holds: name it as what it was before it was compressed, "
            f"for example {os.path.splitext(name)[0]}{JSON_LINES}{os.path.splitext(name)[1]}; accepted is {ACCEPTED}"
        )
    return kind or "text"


def _uncompressed_suffix(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return os.path.splitext(stem)[1] if suffix in COMPRESSED_SUFFIXES else suffix


def _suffix(name: str) -> str:
    """The suffix of a name, with the one before it when it is that of a compressed file."""
    compressed = os.path.splitext(name)[1] if is_compressed(name) else ""
    return _uncompressed_suffix(name) + compressed or _NO_SUFFIX


def _row_group_pieces(file: InputFile, piece_bytes: int) -> list[Piece]:
    """As with lines, a row group belongs to the piece in which its first byte lies."""
    sizes = row_group_sizes(file.path)
    starts = [0, *accumulate(sizes)]
    groups = [list(found) for _, found in groupby(range(len(sizes)), key=lambda group: starts[group] // piece_bytes)]
    # The footer goes with the last piece.
    cuts = [*(starts[group[0]] for group in groups), file.bytes]
    return [
        Piece(file, group[0], group[-1] + 1, stop - start)
        for group, (start, stop) in zip(groups, pairwise(cuts), strict=True)
    ]
