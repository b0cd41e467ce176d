"""Files that appear whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import os
from io import BufferedRandom
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


def open_temporary(path: Path) -> BufferedRandom:
    """Open the temporary file beside ``path`` for reading and writing; ``commit`` gives it its name."""
    return path.with_name(path.name + TEMPORARY_SUFFIX).open("w+b")


def commit(file: BufferedRandom, path: Path) -> None:
    """Close the temporary file of ``path`` and rename it; afterwards it survives a crash of the machine."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    path.with_name(path.name + TEMPORARY_SUFFIX).replace(path)
    # The rename itself is only durable once the folder's entry has reached the disk.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_durably(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, replacing what was there in one step."""
    with open_temporary(path) as file:
        file.write(data)
        commit(file, path)
