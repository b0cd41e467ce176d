"""Files that appear whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import os
import secrets
from io import BufferedRandom
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


def open_temporary(path: Path) -> BufferedRandom:
    """Open a new temporary file beside ``path`` for reading and writing; ``commit`` gives it its name."""
    # A name of its own: a process that was thought dead may still be writing the same file.
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}").open("x+b")


def commit(file: BufferedRandom, path: Path) -> None:
    """Close a temporary file of ``path`` and rename it; afterwards it survives a crash of the machine."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    Path(file.name).replace(path)
    # The rename itself is only durable once the folder's entry has reached the disk.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def discard(file: BufferedRandom) -> None:
    """Close a temporary file and remove it; nothing happens to one that was committed."""
    try:
        file.close()  # flushes, for which a full disk has no room
    finally:
        Path(file.name).unlink(missing_ok=True)


def write_durably(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, replacing what was there in one step."""
    file = open_temporary(path)
    try:
        file.write(data)
        commit(file, path)
    finally:
        discard(file)
