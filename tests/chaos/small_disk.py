"""A small file system of this process's own, which can be filled: a tmpfs that vanishes with the process."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000
_CHUNK = 1 << 16


class SmallDisk:
    """A mounted tmpfs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self, room: int = 0) -> None:
        """Leave ``room`` bytes free."""
        with self._ballast.open("ab", buffering=0) as file, suppress(OSError):
            while (more := shutil.disk_usage(self.folder).free - room) > 0:
                file.write(bytes(min(more, _CHUNK)))

    def clear(self) -> None:
        """Give the room back."""
        self._ballast.unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[SmallDisk]:
    """Mount ``size`` bytes at ``folder``, where this process and those it starts see them and nobody else does.

    Raises RuntimeError where this user may not mount.
    """
    _hide_mounts()
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "trine-chaos", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"no tmpfs can be mounted at {folder}: {done.stderr.strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def _hide_mounts() -> None:
    """Go to a mount namespace of this process's own: however it ends, its mounts end with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None):
        raise RuntimeError(f"the full disk needs a mount, and so root: {os.strerror(ctypes.get_errno())}")
