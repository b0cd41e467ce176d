"""Files that a command writes beside what it prints: an option that names one, and JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..configs.errors import RunError, UsageError

STANDARD_OUTPUT = "-"


def check_target(option: str, target: str | Path | None) -> None:
    """Ask before the work what would spoil it in the end: raise UsageError where ``target`` cannot be written."""
    if target is None or target == STANDARD_OUTPUT:
        return
    path = Path(target)
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{option} {path} cannot be written: name a file in a folder that exists")


def write_json(document: dict[str, Any], target: str) -> None:
    """Write ``--json``, to standard output if ``target`` is ``-``. Raises RunError when the disk fails."""
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    if target == STANDARD_OUTPUT:
        sys.stdout.write(text)
    else:
        written("--json", target, lambda: Path(target).write_text(text, encoding="utf-8"))


def written(option: str, target: str | Path, write: Callable[[], object]) -> None:
    """Call ``write``. Raises RunError, naming the option, when the disk fails."""
    try:
        write()
    except OSError as error:
        raise RunError(f"{option} {target} cannot be written: {error.strerror}") from error
