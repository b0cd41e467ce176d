"""Files of JSON Lines that a resumed run continues."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..configs.errors import RunError

logger = logging.getLogger(__name__)


class Journal:
    """Appends one JSON object per line, each of which names the ``step`` that it belongs to.

    A disk that is full holds lines back until there is room again; it never ends a run.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        """Continue after ``last_step`` steps: what an interrupted run recorded beyond is forgotten."""
        path.parent.mkdir(parents=True, exist_ok=True)
        forget_after(path, last_step)
        self._left = b""
        self._told = False
        self._open(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line. Numbers that are not finite become null, which JSON has."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._left += (json.dumps(finite) + "\n").encode()
        self._write_left()

    def flush(self) -> None:
        """Bring everything to the disk: what a checkpoint covers must not be lost with the machine."""
        self._write_left()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._tell(error)

    def forget_after(self, last_step: int) -> None:
        """Drop what was recorded after ``last_step``, to which the run has gone back.

        Raises RunError where there is no room for it.
        """
        held_back = self._left.decode(errors="replace").splitlines()
        self._left = "".join(f"{line}\n" for line in held_back if _step_of(line) <= last_step).encode()
        self._file.close()
        try:
            forget_after(self._path, last_step)
        finally:
            self._open(self._path)

    def close(self) -> None:
        """Write what is left, and close."""
        self._write_left()
        self._file.close()

    def _write_left(self) -> None:
        try:
            while self._left:
                self._left = self._left[self._file.write(self._left) :]
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            logger.warning("%s cannot be written for now: %s", self._path, error.strerror)
        self._told = True

    def _open(self, path: Path) -> None:
        self._path, self._file = path, path.open("ab", buffering=0)


def forget_after(path: Path, last_step: int) -> None:
    """Drop the lines of steps after ``last_step`` (all, where none was done), and a line that a kill cut short.

    Raises RunError where there is no room for it.
    """
    if not path.exists():
        return
    part = path.with_suffix(".part")
    try:
        with path.open(encoding="utf-8", errors="replace") as lines, part.open("w", encoding="utf-8") as kept:
            kept.writelines(line.rstrip("\n") + "\n" for line in lines if last_step and _step_of(line) <= last_step)
            kept.flush()
            os.fsync(kept.fileno())
        part.replace(path)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written anew ({error.strerror}): make room; then the same command continues"
        ) from error


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
