"""``trine checkpoint verify``: every byte of checkpoints, read by several threads, since hashing leaves them free."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..configs.errors import RunError
from ..pretrain.checkpoints.contents import manifest_of, problem_of
from ..pretrain.checkpoints.inventory import file_sizes
from ..pretrain.checkpoints.manifest import MANIFEST, FileEntry, Problem, problems
from .checkpoint_places import Place
from .checkpoint_text import count, say, size, stream_for_text
from .targets import write_json

_PIECE = 4 << 20
"""Bytes after which the bar moves, and Ctrl-C is seen."""

_NOT_LISTED = "warning: the manifest does not name it, so nothing reads it"


@dataclass(frozen=True)
class Verdict:
    """What was found of one checkpoint."""

    path: Path
    files: dict[str, FileEntry]
    """What the manifest lists."""
    problems: list[Problem]
    """What is damaged, in the order of names."""
    strangers: list[str]
    """Files that the manifest does not list."""

    @property
    def bytes(self) -> int:
        """What was to be read."""
        return sum(entry.bytes for entry in self.files.values())

    @property
    def sentences(self) -> list[str]:
        """What is damaged, for people."""
        return [f"{one.name} {one.what}".strip() for one in self.problems]

    def lines(self) -> list[str]:
        """All that was found, for people."""
        name = self.path.name or str(self.path)
        found = [f"{name}: {sentence}" for sentence in self.sentences]
        if not found:
            read = f"{size(self.bytes)} in {count(len(self.files), 'file')}"
            found = [f"{name}: every byte is as it was written ({read})"]
        return found + [f"{name}: {stranger}: {_NOT_LISTED}" for stranger in self.strangers]

    def document(self) -> dict[str, Any]:
        """For machines."""
        return {
            "path": str(self.path),
            "whole": not self.problems,
            "files": len(self.files),
            "bytes": self.bytes,
            "problems": [{"file": one.name, "what": one.what} for one in self.problems],
            "not_in_manifest": self.strangers,
        }


def show_verdicts(place: Place, newest: bool, workers: int, json_target: str | None) -> int:
    """Verify the checkpoints of ``place`` and print what was found. Returns 1 where some file is damaged, else 0."""
    stream = stream_for_text(json_target)
    verdicts: list[Verdict] = []
    for entry in place.complete()[-1:] if newest else place.complete():
        verdict = verify(entry.path, workers)
        if entry.path.exists():
            verdicts.append(verdict)
            say(verdict.lines(), stream)
        else:
            say([f"{entry.path.name}: removed by its run meanwhile"], stream)
    damaged = [verdict for verdict in verdicts if verdict.problems]
    say([_summary(place, verdicts, damaged)], stream)
    if json_target is not None:
        write_json({"damaged": len(damaged), "checkpoints": [one.document() for one in verdicts]}, json_target)
    return 1 if damaged else 0


def verify(path: Path, workers: int) -> Verdict:
    """Compare every file of one checkpoint with its manifest, with a progress bar where there is a terminal."""
    try:
        files, wrong = manifest_of(path)
    except RunError as error:
        return Verdict(path, {}, [Problem("", problem_of(error, path))], [])
    except OSError as error:
        return Verdict(path, {}, [_unreadable(MANIFEST, error)], [])
    strangers = sorted(file_sizes(path).keys() - files.keys() - {MANIFEST}) if not wrong else []
    with _bar(path.name, sum(entry.bytes for entry in files.values())) as advance:
        found = _problems(path, files, workers, advance)
    return Verdict(path, files, [wrong] if wrong else found, strangers)


def _problems(path: Path, files: dict[str, FileEntry], workers: int, advance: Callable[[int], object]) -> list[Problem]:
    reader = _Reader(advance)
    with ThreadPoolExecutor(workers) as pool:
        try:
            names = sorted(files)
            found = pool.map(lambda name: _problems_of(path, name, files[name], reader), names)
            return [problem for problems_of_one in found for problem in problems_of_one]
        finally:
            reader.stopped.set()


def _problems_of(path: Path, name: str, entry: FileEntry, reader: _Reader) -> list[Problem]:
    try:
        return list(problems(path, {name: entry}, reader.describe))
    except OSError as error:
        return [_unreadable(name, error)]


class _Reader:
    """Reads files in pieces: a file may take minutes, and Ctrl-C must not wait for it."""

    def __init__(self, advance: Callable[[int], object]) -> None:
        self._advance, self._lock = advance, threading.Lock()
        self.stopped = threading.Event()
        """Nobody wants the rest."""

    def describe(self, path: Path) -> FileEntry:
        """A file as it is now."""
        digest, size = hashlib.sha256(), 0
        with path.open("rb", buffering=0) as file:
            while not self.stopped.is_set() and (piece := file.read(_PIECE)):
                digest.update(piece)
                size += len(piece)
                with self._lock:
                    self._advance(len(piece))
        return FileEntry(size, digest.hexdigest())


def _unreadable(name: str, error: OSError) -> Problem:
    return Problem(name, f"cannot be read ({error.strerror})")


@contextmanager
def _bar(name: str, total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar on standard error, if that is a terminal."""
    from tqdm import tqdm

    desc = f"trine: {name}"
    with tqdm(total=total, desc=desc, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        yield bar.update


def _summary(place: Place, verdicts: list[Verdict], damaged: list[Verdict]) -> str:
    if not verdicts:
        return f"{place.run or place.root}: no complete checkpoint, so there is nothing to verify"
    total = size(sum(verdict.bytes for verdict in verdicts))
    if not damaged:
        return f"{count(len(verdicts), 'checkpoint')} verified, {total}"
    if len(damaged) == len(verdicts):
        return f"{len(damaged)} of {count(len(verdicts), 'checkpoint')} damaged: restore the named files from a copy"
    return (
        f"{len(damaged)} of {count(len(verdicts), 'checkpoint')} damaged: restore the named files from a copy, or "
        "remove the checkpoint, and a run continues from the one before"
    )
