"""Files of JSON Lines that a resumed run continues."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Appends one JSON object per line, each of which names the ``step`` that it belongs to."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Continue after ``last_step`` steps: what an interrupted run recorded beyond is forgotten."""
        path.parent.mkdir(parents=True, exist_ok=True)
        forget_after(path, last_step)
        self._file = path.open("a", buffering=1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line."""
        self._file.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        """Hand everything to the system: what a checkpoint covers must not be lost with the process."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


def forget_after(path: Path, last_step: int) -> None:
    """Drop the lines of steps after ``last_step`` (all, where none was done), and a line that a kill cut short."""
    if not path.exists():
        return
    part = path.with_suffix(".part")
    with path.open(encoding="utf-8", errors="replace") as lines, part.open("w", encoding="utf-8") as kept:
        kept.writelines(line.rstrip("\n") + "\n" for line in lines if last_step and _step_of(line) <= last_step)
    part.replace(path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
