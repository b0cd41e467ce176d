"""Checkpoints on disk: written whole or not at all, and trusted only after their checksums agree.

    checkpoints/step-00000100/
        __0_0.distcp ... .metadata common.pt metadata.json     Megatron-Core's sharded tensors
        state.json                                             step, samples, scheduler, data cursor
        manifest.json                                          size and SHA-256 of every other file

A checkpoint is written under ``step-00000100.writing`` and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from ..configs.errors import RunError
from .engine import Engine
from .shards import load_parameters, sharded_state

FORMAT = 2

# torch's CheckpointException is no Exception but a BaseException: nothing else would catch it.
_ENGINE_ERRORS = (CheckpointException, CheckpointingException)

_STATE, _MANIFEST, _WRITING = "state.json", "manifest.json", ".writing"
_COMPLETE = re.compile(r"step-(\d{8,})")


def save(root: Path, step: int, engine: Engine, state: dict[str, Any], keep: int) -> Path:
    """Write checkpoint ``step`` and forget all but the ``keep`` newest. Every rank must call it.

    Args:
        state: the caller's own state, JSON.

    Raises:
        RunError: the checkpoint could not be written; what was there before stays as it was.
    """
    final = root / f"step-{step:08d}"
    writing = final.with_name(final.name + _WRITING)
    _on_first_rank(lambda: _make_empty(writing))
    sharded = sharded_state(engine, is_loading=False)
    try:
        dist_checkpointing.save(sharded, str(writing))
    except (*_ENGINE_ERRORS, OSError, RuntimeError) as error:
        free = shutil.disk_usage(root).free / 2**20
        raise RunError(
            f"checkpoint {final} could not be written ({_last_line(error)}; {free:,.0f} MiB are free there): make room "
            "or name another checkpoint.directory; the checkpoints before it are whole"
        ) from error
    whole = {"format": FORMAT, "step": step, "scheduler": engine.scheduler.state_dict(), "run": state}
    _on_first_rank(lambda: _commit(writing, final, whole))
    _on_first_rank(lambda: _prune(root, keep))
    return final


def find(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint, verified, and the caller's state in it. Every rank must call it and gets the same.

    Rank 0 looks: two ranks may see different files through a network file system, and must not act on that.

    Raises:
        RunError: it is damaged.
    """
    found: list[tuple[Path, dict[str, Any]]] = []

    def look() -> None:
        path = newest(root)
        if path is not None:
            verify(path)
            found.append((path, json.loads((path / _STATE).read_text())["run"]))

    _on_first_rank(look)
    box = [found[0] if found else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def load(path: Path, engine: Engine) -> dict[str, Any]:
    """Load a checkpoint that ``find`` gave and return the caller's state. Every rank must call it.

    Raises:
        RunError: the checkpoint is of another model.
    """
    whole = json.loads((path / _STATE).read_text())
    sharded = sharded_state(engine, is_loading=True)
    try:
        loaded = dist_checkpointing.load(sharded, str(path))
    except _ENGINE_ERRORS as error:
        raise RunError(f"checkpoint {path} does not hold this model: {_last_line(error)}") from error
    load_parameters(engine, loaded["model"])
    engine.optimizer.load_state_dict(loaded["optimizer"])
    engine.restore_schedule(whole["scheduler"])
    state: dict[str, Any] = whole["run"]
    return state


def newest(root: Path) -> Path | None:
    """The complete checkpoint with the highest step, if there is one."""
    return max(_complete(root), default=None)


def verify(path: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        RunError: naming the first file that is missing or differs, and what to do.
    """
    remedy = f"remove {path} to continue from the checkpoint before it"
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        found, files = manifest["format"], {n: (f["bytes"], f["sha256"]) for n, f in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"checkpoint {path} has no readable {_MANIFEST} ({error}); {remedy}") from error
    if found != FORMAT:
        raise RunError(f"checkpoint {path} has format {found}; this version reads format {FORMAT}")
    for name, (size, digest) in files.items():
        file = path / name
        if not file.exists():
            raise RunError(f"checkpoint {path} is damaged: {name} is missing; {remedy}")
        if file.stat().st_size != size or _sha256(file) != digest:
            raise RunError(f"checkpoint {path} is damaged: {name} differs from what was written; {remedy}")


def _complete(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from sorted(e for e in root.iterdir() if _COMPLETE.fullmatch(e.name) and e.is_dir())


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _commit(writing: Path, final: Path, state: dict[str, Any]) -> None:
    (writing / _STATE).write_text(json.dumps(state, indent=1))
    files = sorted(p for p in writing.rglob("*") if p.is_file())
    entries = {
        str(p.relative_to(writing)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files
    }
    (writing / _MANIFEST).write_text(json.dumps({"format": FORMAT, "files": entries}, indent=1))
    for path in [*files, writing / _MANIFEST, writing]:
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    writing.rename(final)
    _sync(final.parent)


def _prune(root: Path, keep: int) -> None:
    for old in list(_complete(root))[:-keep]:
        # Renamed first: a crash in between must not leave half a checkpoint under a complete one's name.
        shutil.rmtree(old.rename(old.with_name(old.name + _WRITING)))
    for left in root.glob(f"*{_WRITING}"):
        shutil.rmtree(left, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _on_first_rank(action: Any) -> None:
    """Run ``action`` on rank 0 and let every rank share its outcome, so that none waits for one that failed."""
    outcome: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except Exception as error:  # whatever it is, the other ranks wait for word of it
            outcome[0] = str(error) or type(error).__name__
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise RunError(outcome[0])


def _last_line(error: BaseException) -> str:
    """What went wrong: torch reports a rank's whole traceback, whose last line names the cause."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].rpartition("Exception: ")[2]
