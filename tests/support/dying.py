"""A job for the rank pool that is killed while it saves."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trine.configs.schema import Config
from trine.parallel import tensor_files
from trine.pretrain.checkpoints import folder, saving
from trine.pretrain.checkpoints.saving import CheckpointWriter
from trine.pretrain.parity import joined_engine

PHASES: dict[str, tuple[Any, str]] = {
    "before the tensors": (tensor_files, "_write_bucket"),
    "before the index": (tensor_files.PendingTensors, "write_index"),
    "before the state": (saving, "write_json"),
    "before the manifest": (saving, "write_manifest"),
    "before the name": (folder, "commit"),
    "before an old one goes": (folder, "superseded"),
    "while an old one goes": (shutil, "rmtree"),
}


def killed_while_saving(rank: int, world_size: int, *, config: dict[str, Any], save: str, phase: str) -> None:
    """Save steps 1, 2 and 3 with ``keep`` 2; the last rank 0 is killed at ``phase`` of the third."""
    run = Config.model_validate(config)
    with joined_engine(rank, world_size, run) as engine:
        writer = CheckpointWriter(Path(save), engine, run.checkpoint)
        for step in (1, 2, 3):
            if step == 3:
                owner, name = PHASES[phase]
                setattr(owner, name, _deadly(getattr(owner, name), phase))
            writer.begin(step, {"steps": step})
            writer.finish()


def _deadly(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if phase == "while an old one goes":
            path = Path(arguments[0])
            if not path.exists():
                return function(*arguments, **options)
            next(path.glob("*.distcp")).unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    return call


def loses_a_file(rank: int, world_size: int, *, config: dict[str, Any], save: str) -> None:
    """Somebody removes a file of a checkpoint that all ranks have written, before it is complete."""
    run = Config.model_validate(config)
    with joined_engine(rank, world_size, run) as engine:
        writer = CheckpointWriter(Path(save), engine, run.checkpoint)
        writer.begin(1, {"steps": 1})
        while writer.busy:
            time.sleep(0.01)
        next(Path(save).glob("*/__0_0.distcp")).unlink()
        writer.finish()
