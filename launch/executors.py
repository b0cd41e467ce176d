"""Processes that share work which needs no communication: those of this machine, or the ranks of an MPI job.

Worker processes import this module before anything else. What is heavy is therefore imported where it is used.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import TYPE_CHECKING, Any

from ..configs.errors import UsageError
from .exit_codes import tell
from .lifeline import end_with_parent
from .machine import usable_cores

if TYPE_CHECKING:
    from ..pretrain.place import Place

Work = Callable[[Executor | None, int], int]
"""What one process manages: it hands tasks to the executor, or does all itself where there is none, and returns the
exit code. The number is that of the processes that work."""


def run_with_workers(work: Work, workers: int | None) -> int:
    """``work``, with ``workers`` processes of this machine or, under mpirun or srun, with the other ranks of the job.

    ``workers`` is by default the number of usable cores; with 1 the work is done in this process. Under MPI rank 0
    manages, the others work until it is done, and each returns an exit code; a single rank does the work itself. When
    ``work`` raises, the workers are ended at once, whatever they do.

    Raises:
        UsageError: ``workers`` is not a number of processes, another launcher has started this process beside
            others, or the ranks have no MPI in common.
    """
    from .environment import find_place

    place = find_place()
    if place.source in ("torchrun", "local"):
        raise UsageError("torchrun starts processes that would all do the same here: use --workers N, mpirun or srun")
    if place.source == "mpi" or place.world_size > 1:
        if workers is not None:
            raise UsageError(
                f"--workers {workers} has no effect under {_launcher(place)}, whose ranks work: leave it out"
            )
        return work(None, 1) if place.world_size == 1 else _run_under_mpi(work, place)
    count = usable_cores() if workers is None else workers
    if count < 1:
        raise UsageError(f"--workers {count} leaves nobody to work: use 1 or more")
    if count == 1:
        return work(None, 1)
    with _local_workers(count) as executor:
        return work(executor, count)


@contextmanager
def _local_workers(count: int) -> Iterator[Executor]:
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(count, mp_context=_Context(), initializer=_begin_worker)
    try:
        yield executor
    except BaseException:
        # A task may take minutes, and nobody waits for its result any more.
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


class _Process(SpawnProcess):
    """A process that Ctrl-C does not reach: the parent answers it."""

    def start(self) -> None:
        # The mask is inherited, so it holds from the first instruction on, while Python itself is still starting.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Context(SpawnContext):
    Process = _Process


def _begin_worker() -> None:
    end_with_parent()
    _encode_on_one_core()


def _encode_on_one_core() -> None:
    # Every core has a process of its own; threads of the encoder would only be in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _run_under_mpi(work: Work, place: Place) -> int:
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:  # the latter when it finds no MPI library
        raise UsageError(
            f"the ranks of {_launcher(place)} work together through mpi4py, which cannot be imported ({error}): "
            "pip install 'trine[mpi]', or start one process and use --workers N"
        ) from error
    world = MPI.COMM_WORLD
    if world.Get_size() != place.world_size:
        raise UsageError(
            f"{_launcher(place)} started {place.world_size} ranks and mpi4py sees {world.Get_size()}: start them with "
            "the mpirun of the MPI that mpi4py was built for, or with srun --mpi=pmix"
        )
    if world.Get_rank() > 0:
        _encode_on_one_core()
    # A rank that left with an exception would leave the others waiting, so none does.
    try:
        ranks: Any = MPICommExecutor(world, root=0)  # typed as itself where it gives a pool, or nothing to workers
        with ranks as executor:
            return 0 if executor is None else _managed(work, executor, world.Get_size() - 1, world.Abort)
    except BaseException as error:
        world.Abort(tell(error))
        raise


def _managed(work: Work, executor: Executor, workers: int, abort: Callable[[int], object]) -> int:
    try:
        return work(executor, workers)
    except BaseException as error:
        # Before the executor is left, which would wait for the tasks that are being worked on.
        abort(tell(error))
        raise


def _launcher(place: Place) -> str:
    return "srun" if place.source == "slurm" else "mpirun"
