"""Which rank this process is, found in the variables that torchrun, Open MPI and Slurm set."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, MutableMapping
from typing import Literal
from zlib import crc32

from ..configs.errors import UsageError
from ..pretrain.place import Place

LAUNCHED_LOCALLY = "TRINE_LAUNCHED_LOCALLY"
"""Set for ranks whose launcher tells the user how they ended, so that they need not do so themselves."""

_THIS_HOST = "127.0.0.1"
_DEFAULT_PORT = 29500
# Below 32768, where Linux begins to give ports to outgoing connections.
_FIRST_PORT, _PORTS = 20000, 12000
# Slurm numbers steps from 0; the batch shell, an interactive shell and the like have numbers from here on.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


def find_place(environ: Mapping[str, str] = os.environ) -> Place:
    """The place that the launcher of this process gave it.

    The innermost launcher counts: torchrun runs under mpirun and srun, and mpirun reaches other hosts through
    srun, whose variables its ranks then see. The shell of ``sbatch`` is no step: it carries SLURM_PROCID=0
    and the job's number of tasks, but nobody started those. Raises UsageError for variables that contradict
    each other.
    """
    place = (
        _from_torchrun(environ)
        or _from_open_mpi(environ)
        or _from_slurm_step(environ)
        or Place(rank=0, world_size=1, local_rank=0, local_world_size=1, source="single")
    )
    if not (0 <= place.rank < place.world_size and 0 <= place.local_rank < place.local_world_size):
        raise UsageError(
            f"the environment of {place.source} gives this process rank {place.rank} of {place.world_size} "
            f"and local rank {place.local_rank} of {place.local_world_size}: unset what another launcher left"
        )
    return place


def export(place: Place, environ: MutableMapping[str, str] = os.environ) -> None:
    """Write ``place`` and the meeting point of its ranks to ``environ`` under the names that PyTorch reads.

    MASTER_ADDR and MASTER_PORT are kept where they are set. Raises UsageError when the meeting point is not
    known.
    """
    if place.source in ("local", "torchrun"):
        return
    environ.setdefault("MASTER_ADDR", _master_address(place, environ))
    environ.setdefault("MASTER_PORT", str(_master_port(place, environ)))
    environ["RANK"], environ["WORLD_SIZE"] = str(place.rank), str(place.world_size)
    environ["LOCAL_RANK"], environ["LOCAL_WORLD_SIZE"] = str(place.local_rank), str(place.local_world_size)


def _from_torchrun(environ: Mapping[str, str]) -> Place | None:
    if any(name not in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")):
        return None
    rank, size, local_rank = (_integer(environ, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_size = _integer(environ, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else size
    source: Literal["local", "torchrun"] = "local" if LAUNCHED_LOCALLY in environ else "torchrun"
    return Place(rank, size, local_rank, local_size, source=source)


def _from_open_mpi(environ: Mapping[str, str]) -> Place | None:
    names = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
    if any(name not in environ for name in names):
        return None
    rank, size, local_rank, local_size = (_integer(environ, name) for name in names)
    return Place(rank, size, local_rank, local_size, source="mpi")


def _from_slurm_step(environ: Mapping[str, str]) -> Place | None:
    names = ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in environ for name in names):
        return None
    step, tasks, rank, local_rank = (_integer(environ, name) for name in names)
    if step >= _FIRST_SPECIAL_STEP:
        return None
    return Place(rank, tasks, local_rank, _tasks_on_this_node(environ, tasks), source="slurm")


def _tasks_on_this_node(environ: Mapping[str, str], tasks: int) -> int:
    """Slurm writes the tasks of a step's nodes as ``2(x3),1``: three nodes with two, then one with one."""
    counts: list[int] = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(repeats or 1)
    node = _integer(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else 0
    return counts[node] if node < len(counts) else tasks


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise UsageError(
            f"the environment variable {name}={environ[name]!r} is not a whole number: unset it, or start "
            "the ranks with torchrun, srun or mpirun"
        ) from None


def _master_address(place: Place, environ: Mapping[str, str]) -> str:
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"]
    if place.local_world_size == place.world_size:
        return _THIS_HOST
    if place.source == "slurm":
        return _first_host(environ)
    raise UsageError(
        f"mpirun started {place.world_size} ranks on several hosts and MASTER_ADDR is not set: name the host "
        "of rank 0 with mpirun -x MASTER_ADDR=HOST"
    )


def _first_host(environ: Mapping[str, str]) -> str:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return listing.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise UsageError(
            f"'{' '.join(command)}' does not tell the first host of this Slurm step ({error}): "
            "set MASTER_ADDR to that host"
        ) from error


def _master_port(place: Place, environ: Mapping[str, str]) -> int:
    """The same on every rank, and another for other jobs on the same hosts."""
    if place.source == "single":
        return 0
    if place.source == "slurm":
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        identity = ".".join(environ.get(name, "") for name in names)
    else:
        identity = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid", "")
    return _FIRST_PORT + crc32(identity.encode()) % _PORTS if identity else _DEFAULT_PORT
