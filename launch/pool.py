"""Rank processes of this machine that are started once and run one distributed job after another.

The workers import this module before anything else. What is heavy is therefore imported where it is used.
"""

from __future__ import annotations

import gc
import importlib
import io
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn

import psutil  # type: ignore[import-untyped]

from ..configs.errors import RunError, UsageError
from .lifeline import end_forks_with_rank, end_with_parent
from .machine import usable_cores

JOB_SECONDS = 600.0

_GRACE_S = 0.5
"""How long a failure waits for the word of other ranks, whose own may be the cause."""
_DEATH_S = 5
"""How long a worker that has closed its end may take to be gone."""
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@dataclass(frozen=True)
class _Task:
    """What a worker is asked to do."""

    job: str
    rank: int
    world_size: int
    store: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class _Failure:
    """How a job ended badly on one rank."""

    kind: Literal["usage", "run", "mistake", "death"]
    """UsageError, RunError, any other exception, or the end of the process."""
    message: str
    trace: str = ""
    """The traceback of a mistake, which the sentence alone does not explain."""


@dataclass(frozen=True)
class _Worker:
    process: SpawnProcess
    connection: Connection


class RankPool:
    """Runs ``module:function(rank, world_size, **arguments)`` on several ranks and collects what they return.

    The function finds a joined process group (gloo on CPUs, NCCL on GPUs) and its share of the cores. It
    returns plain values: numbers, strings, tensors, and lists, tuples and dicts of them. Its arguments are such
    values too. A pool whose job failed starts new workers for the next one, because a rank may still wait for
    another that failed. Workers end with the process that made the pool, however that ends.

    Args:
        seconds: how long a job may take, the start of its workers included.
        use_gpus: give each rank its own GPU, of which there must be as many as ranks. False hides the GPUs that
            the machine has.
        quiet: drop what the ranks print; a failure is told by exceptions alone.
    """

    def __init__(self, seconds: float = JOB_SECONDS, *, use_gpus: bool = False, quiet: bool = False) -> None:
        self.seconds = seconds
        self._use_gpus, self._quiet = use_gpus, quiet
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._kill()

    def run(self, job: str, world_size: int, **arguments: Any) -> list[Any]:
        """What each rank returned, by rank, with every tensor on the CPU.

        Raises:
            UsageError: a rank raised it; the sentence is unchanged.
            RunError: a rank raised anything else, died, or did not answer in time. The sentence names the rank; a
                note holds the traceback of an exception that is neither.
        """
        while len(self._workers) < world_size:
            self._workers.append(self._start())
        workers = self._workers[:world_size]
        with tempfile.TemporaryDirectory(prefix="trine-") as folder:
            store = str(Path(folder, "store"))
            for rank, worker in enumerate(workers):
                with suppress(BrokenPipeError):  # a worker that has died is found where its answer is waited for
                    worker.connection.send(_Task(job, rank, world_size, store, arguments))
            try:
                return self._collect(workers)
            except BaseException:  # Ctrl-C too: what is still to come must not be taken for the next job's answer
                self._kill()
                raise

    def close(self) -> None:
        """End the workers, which wait for a job."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(timeout=5)
        self._kill()

    def _kill(self) -> None:
        for worker in self._workers:
            _kill_tree(worker.process)
            worker.connection.close()
        self._workers = []

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._use_gpus, self._quiet))
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _collect(self, workers: Sequence[_Worker]) -> list[Any]:
        """Every rank's result; the first failure ends the wait."""
        results: dict[int, Any] = {}
        failures: dict[int, _Failure] = {}
        deadline = time.monotonic() + self.seconds
        while pending := [r for r in range(len(workers)) if r not in results and r not in failures]:
            limit = _GRACE_S if failures else max(0.0, deadline - time.monotonic())
            ready = wait([workers[rank].connection for rank in pending], timeout=limit)
            if not ready and not failures:
                late = ", ".join(map(str, pending))
                raise RunError(f"no answer from rank {late} of {len(workers)} within {self.seconds:g} s")
            if not ready:
                break
            for rank in pending:
                if workers[rank].connection in ready:
                    answer = _receive(workers[rank])
                    (failures if isinstance(answer, _Failure) else results)[rank] = answer
        if failures:
            _raise_cause(failures, len(workers))
        return [results[rank] for rank in range(len(workers))]


def _receive(worker: _Worker) -> Any:
    """A rank's result, or its failure."""
    import torch

    try:
        failure: _Failure | None = worker.connection.recv()
        if failure is not None:
            return failure
        return torch.load(io.BytesIO(worker.connection.recv_bytes()), map_location="cpu", weights_only=True)
    except (EOFError, ConnectionResetError):
        return _Failure("death", _how_it_died(worker.process))


def _how_it_died(process: SpawnProcess) -> str:
    process.join(timeout=_DEATH_S)
    code = process.exitcode
    if code is None or code >= 0:
        return f"ended with exit code {code} and no message"
    hint = ", as happens when memory runs out" if code == -signal.SIGKILL else ""
    return f"was killed by signal {-code} ({signal.Signals(-code).name}){hint}"


def _raise_cause(failures: dict[int, _Failure], world_size: int) -> NoReturn:
    """The first failure, or a rank that died: its peers, which lose their connections, may tell so before."""
    deaths = [item for item in failures.items() if item[1].kind == "death"]
    rank, failure = deaths[0] if deaths else next(iter(failures.items()))
    if failure.kind == "usage":
        raise UsageError(failure.message)
    error = RunError(f"rank {rank} of {world_size} {failure.message}")
    if failure.trace:
        error.add_note(failure.trace)
    raise error


def _kill_tree(process: SpawnProcess) -> None:
    """End a worker, and what it has started: processes that write checkpoints."""
    if process.pid is not None and process.is_alive():
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
    process.join()


def _serve(connection: Connection, use_gpus: bool, quiet: bool) -> None:
    """The life of a worker: one task after another until the pool is closed or a task fails."""
    end_with_parent()
    end_forks_with_rank()
    _set_environment(use_gpus)
    if quiet:
        _drop_output()
    while True:
        try:
            task: _Task = connection.recv()
        except EOFError:
            return
        try:
            answer = _perform(task)
        except Exception as error:
            connection.send(_failure(error))
            # Leaving would break connections that peers wait on, and they would tell of that instead.
            connection.poll(None)
            return
        connection.send(None)
        connection.send_bytes(answer)


def _set_environment(use_gpus: bool) -> None:
    """Keep the ranks' communication inside the machine, and GPUs out of sight where the pool is to do without."""
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = _LOOPBACK
    if not use_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _drop_output() -> None:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)


def _perform(task: _Task) -> bytes:
    """Run a task inside a process group of its own and return the result as ``torch.save`` writes it."""
    import torch
    import torch.distributed as dist

    from ..parallel import topology

    job = _resolve(task.job)
    # What has been imported stays, and would be most of what the collection below looks at.
    gc.freeze()
    torch.set_num_threads(max(1, usable_cores() // task.world_size))
    topology.join(task.rank, task.world_size, task.rank, init_method=f"file://{task.store}")
    result = job(task.rank, task.world_size, **task.arguments)
    buffer = io.BytesIO()
    torch.save(result, buffer)
    # A rank that left at once could break the connections that a slower one is still making.
    dist.barrier()
    topology.leave_topology()
    topology.leave()
    # Groups end their threads when they are collected; until then each job would add some.
    gc.collect()
    return buffer.getvalue()


def _resolve(job: str) -> Callable[..., Any]:
    module, _, function = job.partition(":")
    resolved: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return resolved


def _failure(error: Exception) -> _Failure:
    message = str(error).strip()
    if isinstance(error, UsageError):
        return _Failure("usage", message)
    first_line = message.partition("\n")[0]
    if isinstance(error, RunError):
        return _Failure("run", f"failed: {first_line}")
    return _Failure("mistake", f"failed: {type(error).__name__}: {first_line}", traceback.format_exc())
