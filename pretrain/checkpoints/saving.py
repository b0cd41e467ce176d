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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...configs.errors import RunError
from ...configs.schema import Checkpoint
from ...parallel.agreement import done_by_first_rank, gathered, together
from ...parallel.engine import Engine
from ...parallel.random_states import RandomStates
from ...parallel.tensor_files import PendingTensors, TensorWriter, Written
from . import folder
from .manifest import INDEX, MANIFEST, RANDOM, STATE, TENSORS, FileEntry, describe, write_json, write_manifest

logger = logging.getLogger(__name__)

_ROOM = 1.2
"""A save is not begun unless this many times the size of the last one is free."""
_DAMAGED_KEPT = 2
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

    def __init__(self, root: Path, engine: Engine, settings: Checkpoint):
        self._root, self._engine, self._settings = root, engine, settings
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
            "updates": self._engine.updates,
            "learning_rate": self._engine.learning_rate,
            "fp8": self._engine.fp8.state(),
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
        own = together(pending.tensors.written, self._engine.topology)
        written = gathered(own)
        path, self._bytes = done_by_first_rank(lambda: self._complete(pending, written))
        ended = time.perf_counter()
        return Saved(path, pending.stall_s + ended - started, ended - pending.begun, self._bytes)

    def _make_folder(self, step: int) -> Path:
        self._root.mkdir(parents=True, exist_ok=True)
        for left in folder.unfinished(self._root):
            shutil.rmtree(left, ignore_errors=True)
        self._check_room(step)
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
            fresh = [pending.writing / name for name in (INDEX, STATE, TENSORS, RANDOM, MANIFEST)]
            path = folder.commit(pending.writing, fresh)
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
        for name, entry in files.items():
            if (size := (writing / name).stat().st_size) != entry.bytes:
                raise RunError(f"{name} has {size:,} bytes instead of {entry.bytes:,}")
        files |= {name: describe(writing / name) for name in (INDEX, STATE, TENSORS, RANDOM)}
        write_manifest(writing, files)
        return files

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
        try:
            for path in folder.superseded(self._root, self._settings.keep, self._settings.keep_every):
                folder.remove(path)
            # The newest of the damaged ones stay for whoever wants to know what happened; all would fill the disk.
            for path in folder.damaged(self._root)[:-_DAMAGED_KEPT]:
                folder.remove(path)
        except OSError as error:
            logger.warning("old checkpoints in %s cannot be removed: %s", self._root, error)
