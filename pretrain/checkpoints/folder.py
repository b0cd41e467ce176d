"""The folder of a run's checkpoints: which there are, which are whole, and which may go.

    checkpoints/
        step-00000100/            complete: it got this name when everything in it was on disk
            __0_0.distcp ...      sharded tensors, with .metadata as their index (Megatron-Core's format)
            state.json            everything else: progress, data cursor, schedule, configuration
            tensors.json          name, shape and dtype of every tensor
            random.npz            the states of the random generators
            manifest.json         size and SHA-256 of every other file
        step-00000200.8f3a1c.writing/   not complete, or on its way out
        step-00000050.damaged/    was complete, and its files no longer agree with its manifest
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

WRITING, DAMAGED = ".writing", ".damaged"

_COMPLETE = re.compile(r"step-(\d{8,})")


def path_of(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is once it is complete."""
    return root / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a complete checkpoint, by its name."""
    return int(path.name.removeprefix("step-"))


def complete(root: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    if not root.is_dir():
        return []
    found = [entry for entry in root.iterdir() if _COMPLETE.fullmatch(entry.name) and entry.is_dir()]
    return sorted(found, key=step_of)


def newest(root: Path) -> Path | None:
    """The complete checkpoint of the highest step, if there is one."""
    return next(reversed(complete(root)), None)


def unfinished(root: Path) -> list[Path]:
    """What saves that did not come to their end have left."""
    return sorted(root.glob(f"step-*{WRITING}"))


def damaged(root: Path) -> list[Path]:
    """Checkpoints that were found damaged."""
    return sorted(root.glob(f"step-*{DAMAGED}"))


def begin(root: Path, step: int) -> Path:
    """A new folder in which the checkpoint of ``step`` can be written, and nobody else writes."""
    writing = _unfinished_name(path_of(root, step))
    writing.mkdir(parents=True)
    return writing


def commit(writing: Path, fresh: Iterable[Path]) -> Path:
    """Bring the ``fresh`` files to disk, where the others are, and give the folder its name as a complete one.

    Where a run that went back comes to a step again, the new checkpoint takes the place of the old one. Raises OSError
    as long as nothing has changed; once the folder has its name, the checkpoint counts.
    """
    final = writing.with_name(writing.name.partition(".")[0])
    for path in (*fresh, writing):
        _sync(path)
    old = final.rename(_unfinished_name(final)) if final.exists() else None
    try:
        writing.rename(final)
    except OSError:
        if old is not None:
            old.rename(final)
        raise
    try:
        _sync(final.parent)
        if old is not None:
            shutil.rmtree(old)
    except OSError as error:
        logger.warning("after %s was completed: %s", final, error)
    return final


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that none takes it for a good one; an older one of its step goes."""
    aside = _marked(path, DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def remove(path: Path) -> None:
    """Delete a checkpoint."""
    if _COMPLETE.fullmatch(path.name):
        # Renamed first: a crash in between must not leave half a checkpoint under a complete one's name.
        path = path.rename(_unfinished_name(path))
    shutil.rmtree(path)


def superseded(root: Path, keep: int, keep_every: int) -> list[Path]:
    """The complete checkpoints that are neither among the ``keep`` newest nor of a multiple of ``keep_every`` steps.

    Links are somebody's own arrangement and stay.
    """
    old = [path for path in complete(root)[:-keep] if not path.is_symlink()]
    return [path for path in old if not keep_every or step_of(path) % keep_every]


def _marked(path: Path, mark: str) -> Path:
    return path.with_name(path.name + mark)


def _unfinished_name(path: Path) -> Path:
    """A name that nobody else uses, at which nobody takes the folder for a checkpoint."""
    return path.with_name(f"{path.name}.{secrets.token_hex(3)}{WRITING}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
