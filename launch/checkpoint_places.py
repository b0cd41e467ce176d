"""What the DIR of ``trine checkpoint`` is: a run's folder, a folder of checkpoints, or one checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..configs.errors import RunError, UsageError
from ..configs.locations import scheme_of
from ..pretrain.checkpoints.document import Document
from ..pretrain.checkpoints.inventory import Entry, entries, entry_of
from ..pretrain.checkpoints.manifest import MANIFEST, STATE

_REMEDY = "name the folder of a run, a folder of checkpoints such as its 'checkpoints'"
_CONFIG, _CHECKPOINTS, _LOCK = "config.yaml", "checkpoints", "run.lock"


@dataclass(frozen=True)
class Place:
    """Where to look for checkpoints."""

    root: Path
    """The folder that holds them."""
    run: Path | None = None
    """The run's folder, if that was named."""
    one: Path | None = None
    """The one checkpoint that was named."""

    def entries(self) -> list[Entry]:
        """Every checkpoint, or the one, oldest first."""
        if self.one is None:
            return entries(self.root) if self.root.exists() else []
        return [entry_of(self.one) or Entry(self.one, 0, "complete")]

    def complete(self) -> list[Entry]:
        """Those that are complete by their names, or the one."""
        return [entry for entry in self.entries() if entry.state == "complete" or self.one is not None]

    @property
    def nothing(self) -> str:
        """The sentence where there are none."""
        return f"{self.run or self.root}: no checkpoint yet"


@contextmanager
def told(directory: str) -> Iterator[None]:
    """Within it a file system that refuses ends in one sentence."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{error.filename or directory} cannot be read ({error.strerror}): make it readable, or name another DIR"
        ) from error


def find(directory: str) -> Place:
    """What ``directory`` is. Raises UsageError where it is none of these, OSError where it cannot be looked at."""
    path = Path(directory)
    if not path.is_dir():
        raise UsageError(f"DIR={directory} {_why_not(path, directory)}: {_REMEDY}, or one checkpoint")
    # A path such as '.' has no name of its own.
    if entry_of(path.resolve()) or (path / MANIFEST).exists():
        return Place(path.resolve().parent, one=path)
    if (path / _CHECKPOINTS).is_dir():
        return Place(path / _CHECKPOINTS, run=path)
    if not any(path.iterdir()) or entries(path):
        return Place(path)
    if (path / _CONFIG).is_file():
        return Place(_elsewhere(path), run=path)
    raise UsageError(f"DIR={directory} holds no checkpoint: {_REMEDY}, or one checkpoint")


def find_many(directory: str) -> Place:
    """The same, and one checkpoint is refused too."""
    place = find(directory)
    if place.one is not None:
        raise UsageError(f"DIR={directory} is one checkpoint: name the folder that holds it, {place.root}")
    return place


def runs_of(place: Place) -> list[Path]:
    """The folders of the runs that may write to ``place``, each of which has its lock in it."""
    found = [place.run] if place.run is not None else []
    parent = place.root.resolve().parent
    if any((parent / name).exists() for name in (_CONFIG, _LOCK)) and place.root.resolve().name == _CHECKPOINTS:
        found.append(parent)
    for entry in place.complete()[-1:]:
        found += _run_in(Document.read(entry.path / STATE), place.root)
    return list(dict.fromkeys(path.resolve() for path in found))


def _why_not(path: Path, directory: str) -> str:
    if path.exists():
        return "is a file"
    return "is a URL, and checkpoints are read in folders alone" if scheme_of(directory) else "does not exist"


def _elsewhere(run: Path) -> Path:
    """Where a run, by the configuration that it has left, keeps its checkpoints."""
    from ..configs.loading import load_config

    config = load_config(run / _CONFIG)
    start = _start_of(config.run.directory, run)
    return (start or Path()) / config.checkpoint_directory


def _run_in(state: Document, root: Path) -> Iterator[Path]:
    """The folder of the run that wrote ``state``, if it writes to ``root`` and not to what that was copied from."""
    config = state.at("run", "config")
    run, own = config.at("run", "directory").text, config.at("checkpoint", "directory").text
    if run is None or "\0" in f"{run}{own}":
        return
    start = _start_of(Path(own) if own else Path(run) / _CHECKPOINTS, root)
    if start is not None and (start / run).is_dir():
        yield start / run


def _start_of(named: Path, actual: Path) -> Path | None:
    """The folder from which ``named`` leads to ``actual``: where a run with relative paths was started."""
    parents = actual.resolve().parents
    return next((base for base in parents if (base / named).exists() and (base / named).samefile(actual)), None)
