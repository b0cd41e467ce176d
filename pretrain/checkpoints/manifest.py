"""What a checkpoint's files were when they were written, and whether they still are."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...configs.errors import RunError

FORMAT = 4
MANIFEST, STATE, TENSORS, RANDOM = "manifest.json", "state.json", "tensors.json", "random.npz"

INDEX = ".metadata"
_NEEDED = {INDEX, STATE, TENSORS, RANDOM}
"""Every checkpoint has these; the first is unpickled, by torch, and so never opened unless it is vouched for."""


class FileEntry(NamedTuple):
    """A file as it was written."""

    bytes: int
    sha256: str


class Problem(NamedTuple):
    """What is wrong with a file."""

    name: str
    what: str
    """To be read after the name."""


def describe(path: Path) -> FileEntry:
    """A file as it is now."""
    with path.open("rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def write_manifest(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Write down what every file of a checkpoint is."""
    entries = {name: entry._asdict() for name, entry in sorted(files.items())}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": entries})


def read_manifest(folder: Path) -> dict[str, FileEntry]:
    """Every file of a checkpoint but the manifest.

    Raises:
        DamageError: there is no manifest that can be read.
        RunError: the checkpoint has another format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if (found := manifest["format"]) != FORMAT:
            raise RunError(
                f"checkpoint {folder} has format {found}; this version of trine reads format {FORMAT}: use the version "
                "that wrote it, or begin anew in another run.directory"
            )
        files = {_plain(name): FileEntry(int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()}
    except FileNotFoundError as error:
        raise DamageError(folder, Problem(MANIFEST, "is missing")) from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DamageError(folder, Problem(MANIFEST, f"cannot be understood ({error})")) from error
    for name in _NEEDED - files.keys():
        raise DamageError(folder, Problem(MANIFEST, f"does not list {name}"))
    return files


def problems(
    folder: Path, files: Mapping[str, FileEntry], now: Callable[[Path], FileEntry] = describe
) -> Iterable[Problem]:
    """Those of ``files`` that are missing or no longer what they were, in order; ``now`` reads what one is."""
    for name, entry in files.items():
        problem = _problem(folder / name, entry, now)
        if problem is not None:
            yield problem


def _problem(path: Path, entry: FileEntry, now: Callable[[Path], FileEntry]) -> Problem | None:
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return Problem(path.name, f"has {size:,} bytes instead of {entry.bytes:,}")
        if now(path).sha256 != entry.sha256:
            return Problem(path.name, "differs from what was written")
    except FileNotFoundError:
        return Problem(path.name, "is missing")
    except OSError as error:
        if error.errno != errno.EIO:  # anything else is an outage
            raise
        return Problem(path.name, "cannot be read from its disk")
    return None


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        DamageError: naming the first file that is missing or differs.
        RunError: the checkpoint has another format.
    """
    for problem in problems(folder, read_manifest(folder)):
        raise DamageError(folder, problem)


class DamageError(RunError):
    """A checkpoint is not what was written."""

    def __init__(self, folder: Path, problem: Problem) -> None:
        self.problem = problem
        super().__init__(f"checkpoint {folder} is damaged: {problem.name} {problem.what}")


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json``, which must have been verified."""
    state: dict[str, Any] = json.loads((folder / STATE).read_bytes())
    return state


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write ``document`` for machines and for people."""
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _plain(name: str) -> str:
    """A manifest that somebody wrote must not lead out of the checkpoint."""
    if not re.fullmatch(r"(?!\.\.?$)[A-Za-z0-9._-]+", name):
        raise ValueError(f"{name!r} is no name of a file")
    return name
