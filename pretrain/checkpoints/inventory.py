"""Everything in a folder of checkpoints, whole or not, by its name."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .folder import DAMAGED, WRITING

State = Literal["complete", "unfinished", "damaged"]

_NAME = re.compile(rf"step-(\d{{8,}})(?:(?:\.[0-9a-f]+)?({re.escape(WRITING)})|({re.escape(DAMAGED)}))?")
_STATES: dict[str | None, State] = {None: "complete", WRITING: "unfinished", DAMAGED: "damaged"}


@dataclass(frozen=True)
class Entry:
    """A checkpoint in the state that its name gives it."""

    path: Path
    step: int
    state: State


def entry_of(path: Path) -> Entry | None:
    """What a path is by its name; None where that is no checkpoint's."""
    match = _NAME.fullmatch(path.name)
    return Entry(path, int(match[1]), _STATES[match[2] or match[3]]) if match else None


def entries(root: Path) -> list[Entry]:
    """Every checkpoint in ``root``, oldest first."""
    found = [entry for path in root.iterdir() if (entry := entry_of(path)) and path.is_dir()]
    return sorted(found, key=lambda entry: (entry.step, entry.path.name))


def file_sizes(path: Path) -> dict[str, int]:
    """The bytes of everything in a checkpoint that is there now. A run may remove it meanwhile."""
    sizes: dict[str, int] = {}
    try:
        with os.scandir(path) as found:
            for file in found:
                sizes[file.name] = file.stat().st_size
    except FileNotFoundError:
        pass
    return sizes
