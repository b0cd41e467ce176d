"""Saving: tensors by all ranks beside the training, then everything else and the name by rank 0.

    begin   rank 0 makes the folder; every rank copies its tensors and starts to write them
    busy    a thread of each rank writes and hashes its files; training goes on
    finish  the ranks tell rank 0 what they wrote; it adds state and manifest and renames the folder

Until the last step the checkpoint does not exist; a failure at any point before removes the folder again.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...configs.errors import RunError
from ...configs.schema import Checkpoint
from ...parallel.agreement import done_by_first_rank, gathered
from ...parallel.engine import Engine
from ...parallel.random_states import RandomStates
from ...parallel.tensor_files import PendingTensors, TensorWriter, Written
from . import folder
from .manifest import MANIFEST, RANDOM, STATE, TENSORS, FileEntry, describe, write_json, write_manifest

logger = logging.getLogger(__name__)

_ROOM = 1.2
"""A save is not begun unless this many times the size of the last one is free."""
_MIB = 1 << 20


@dataclass(frozen=True)
class Saved:
    """A finished save."""

    path: Path
    stall_s: float
    """Seconds that training waited for it."""
    total_s: float
    """Seconds from its beginning until it was complete."""
    bytes: int


@dataclass
class _Pending:
    step: int
    writing: Path
    tensors: PendingTensors
    state: dict[str, Any]
    random: list[RandomStates]
    begun: float
    stall_s: float


class CheckpointWriter:
    """Writes one checkpoint after the other. Every rank holds one and must call the same methods."""

    def __init__(self, root: Path, engine: Engine, settings: Checkpoint, fence: Callable[[], None] = lambda: None):
        """``fence`` is called by rank 0 before a checkpoint gets its name, and raises RunError where it may not."""
        self._root, self._engine, self._settings, self._fence = root, engine, settings, fence
        self._tensors = TensorWriter(engine)
        self._pending: _Pending | None = None
        self._bytes = 0

    @property
    def pending(self) -> bool:
        """Whether a save has been begun and not finished; the same on every rank."""
        return self._pending is not None

    @property
    def busy(self) -> bool:
        """Whether this rank still writes. When none does, ``finish`` does not wait."""
        return self._pending is not None and self._pending.tensors.busy

    def begin(self, step: int, state: dict[str, Any]) -> None:
        """Start to save the engine as it is now, with ``state``, which is JSON.

        Raises:
            RunError: there is no room, or the folder cannot be made.
        """
        begun = time.perf_counter()
        writing = done_by_first_rank(lambda: self._make_folder(step))
        random = gathered(self._engine.random_states())
        tensors = self._tensors.begin(writing)
        whole = {
            "step": step,
            "scheduler": self._engine.scheduler.state_dict(),
            "optimizer": tensors.plain,
            "run": state,
        }
        self._pending = _Pending(step, writing, tensors, whole, random, begun, time.perf_counter() - begun)

    def finish(self) -> Saved | None:
        """Wait until everybody has written and complete the checkpoint; None if none was begun.

        Raises:
            RunError: it could not be written; what was there before stays as it was.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        started = time.perf_counter()
        written = gathered(pending.tensors.written())
        path, self._bytes = done_by_first_rank(lambda: self._complete(pending, written))
        ended = time.perf_counter()
        return Saved(path, pending.stall_s + ended - started, ended - pending.begun, self._bytes)

    def _make_folder(self, step: int) -> Path:
        self._root.mkdir(parents=True, exist_ok=True)
        self._check_room(step)
        for left in folder.unfinished(self._root):
            shutil.rmtree(left, ignore_errors=True)
        return folder.begin(self._root, step)

    def _check_room(self, step: int) -> None:
        free = shutil.disk_usage(self._root).free
        if free < _ROOM * self._bytes:
            raise RunError(
                f"checkpoint {folder.path_of(self._root, step)} is not begun: {free / _MIB:,.1f} MiB are free there "
                f"and the last one has {self._bytes / _MIB:,.1f}; make room, or name another checkpoint.directory"
            )

    def _complete(self, pending: _Pending, written: list[Written]) -> tuple[Path, int]:
        """Rank 0's part: the index, the state, the manifest, the name; then old checkpoints go."""
        try:
            files = self._write_rest(pending, written)
            self._fence()
            path = folder.commit(pending.writing, [pending.writing / name for name in self._own(files, written)])
        except Exception as error:
            failure = self._failure(pending, error)  # it tells how much room there is before the folder goes
            shutil.rmtree(pending.writing, ignore_errors=True)
            raise RunError(failure) from error
        self._prune()
        return path, sum(entry.bytes for entry in files.values())

    def _write_rest(self, pending: _Pending, written: list[Written]) -> dict[str, FileEntry]:
        failures = [f"rank {rank}: {one.error}" for rank, one in enumerate(written) if one.error]
        if failures:
            raise RunError("; ".join(failures[:3]))
        writing = pending.writing
        pending.tensors.write_index([one.results for one in written])
        write_json(writing / STATE, pending.state)
        write_json(writing / TENSORS, pending.tensors.shapes())
        RandomStates.write(writing / RANDOM, pending.random)
        files = {file.name: FileEntry(file.bytes, file.sha256) for one in written for file in one.files}
        for path in writing.iterdir():
            if path.name not in files:
                files[path.name] = describe(path)
        write_manifest(writing, files)
        return files

    def _own(self, files: dict[str, FileEntry], written: list[Written]) -> list[str]:
        """What rank 0 has just written, and is not on disk for certain."""
        by_ranks = {file.name for one in written for file in one.files}
        return [MANIFEST, *(name for name in files if name not in by_ranks)]

    def _failure(self, pending: _Pending, error: Exception) -> str:
        try:
            free = f"{shutil.disk_usage(self._root).free / _MIB:,.1f} MiB are free there"
        except OSError:
            free = "its folder is gone"
        return (
            f"checkpoint {folder.path_of(self._root, pending.step)} could not be written ({error}; {free}): make room, "
            "or name another checkpoint.directory; the checkpoints before it are whole"
        )

    def _prune(self) -> None:
        for path in folder.superseded(self._root, self._settings.keep, self._settings.keep_every):
            try:
                folder.remove(path)
            except OSError as error:
                logger.warning("the old checkpoint %s cannot be removed: %s", path, error)
