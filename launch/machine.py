"""How much of this machine a process may use."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that this process may use: those of its affinity, and no more than its container's share."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = _limit("cpu.max")
    return max(1, min(cores, quota)) if quota else cores


def usable_memory() -> int:
    """Bytes of memory that this process may use: the machine's, and no more than its container's limit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(memory, _limit("memory.max") or memory)


def _limit(name: str) -> int | None:
    """A limit of the control group that a container sees as its own; ``cpu.max`` is a quota and a period."""
    try:
        words = (_CGROUP / name).read_text().split()
    except OSError:
        return None
    if not words or words[0] == "max":
        return None
    return math.ceil(int(words[0]) / int(words[1])) if len(words) > 1 else int(words[0])
