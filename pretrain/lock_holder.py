"""Who holds a run directory, as its lock says, and whether that process is still there."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

_DIGITS = 12


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    token: str
    host: str
    machine: str
    """Within which a process id means one process: a boot of a kernel, and a namespace."""
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    pid_started: float
    """Tells the process from a later one with the same id."""
    job: str | None
    """SLURM_JOB_ID.SLURM_RESTART_COUNT."""

    def __str__(self) -> str:
        job = f" (Slurm job {self.job})" if self.job else ""
        return f"process {self.pid} on host {self.host}{job}"

    def is_restart_of(self, former: Holder) -> bool:
        """Whether Slurm has put the job of ``former`` back into its queue and started it again as this one."""
        if former.job is None or self.job is None:
            return False
        (job, _, start), (own_job, _, own_start) = former.job.partition("."), self.job.partition(".")
        return job == own_job and start.isdecimal() and own_start.isdecimal() and int(start) < int(own_start)


_HOLDER = TypeAdapter(Holder)


def encode(holder: Holder, beat: int) -> bytes:
    """The lock's text, of the same length for every beat: readers of one that is written see one beat or another."""
    fields = json.dumps(asdict(holder), indent=1).removesuffix("\n}")
    return f'{fields},\n "beat": {beat:{_DIGITS}}\n}}\n'.encode()


def parse(data: bytes | None) -> Holder | None:
    """The holder that a lock names; None for one that is absent, empty or garbled."""
    try:
        return _HOLDER.validate_json(data or b"")
    except ValidationError:
        return None


def has_token(token: str) -> Callable[[bytes | None], bool]:
    """A test whether a lock is that of ``token``."""

    def has_token(data: bytes | None) -> bool:
        holder = parse(data)
        return holder is not None and holder.token == token

    return has_token


def this_process() -> Holder:
    """This process as a holder, with a new token."""
    job = os.environ.get("SLURM_JOB_ID")
    return Holder(
        token=secrets.token_hex(16),
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        pid_started=_started(os.getpid()) or 0.0,
        job=f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else None,
    )


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _started(pid: int) -> float | None:
    """When a process started, in a measure of its machine; None for one that has ended or is dead."""
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        # Clock ticks since the boot, which no change of the clock moves.
        return None if fields[0] in "ZX" else float(fields[19])
    import psutil  # type: ignore[import-untyped]

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def is_gone(holder: Holder) -> bool:
    """Whether the holder was a process of this machine and has ended."""
    if holder.machine != _machine():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's, of which nothing more may be seen
        return False
    return _started(holder.pid) != holder.pid_started
