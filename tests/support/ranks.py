"""Worker processes that are started once per session and run distributed jobs of up to eight ranks."""

from __future__ import annotations

import gc
import importlib
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil

JOB_SECONDS = 240


class JobFailed(AssertionError):
    """A rank raised, died or did not answer in time."""


class RankPool:
    """Runs ``module:function(rank, world_size, **arguments)`` on several ranks and collects what they return.

    The function finds a joined process group (gloo on loopback). A pool whose job failed is thrown away, because its
    other ranks may wait for one that raised.
    """

    def __init__(self) -> None:
        self._context = mp.get_context("spawn")
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: str, world_size: int, **arguments: Any) -> list[Any]:
        """The results by rank. Raises JobFailed with the first rank's traceback."""
        while len(self._workers) < world_size:
            self._workers.append(self._start())
        workers = self._workers[:world_size]
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, connection) in enumerate(workers):
                connection.send((function, rank, world_size, os.path.join(folder, "store"), arguments))
            return self._collect(workers)

    def close(self) -> None:
        """End every worker: one that waits for a job ends by itself, one that hangs in a job is killed."""
        for _, connection in self._workers:
            connection.close()
        for process, _ in self._workers:
            process.join(timeout=5)
            if process.is_alive():
                for child in psutil.Process(process.pid).children(recursive=True):  # checkpoint writers
                    child.kill()
                process.kill()
            process.join()
        self._workers = []

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,))
        process.start()
        theirs.close()
        return process, ours

    def _collect(self, workers: Sequence[tuple[Any, Connection]]) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + JOB_SECONDS
        ranks = {connection: rank for rank, (_, connection) in enumerate(workers)}
        while len(results) < len(workers):
            pending = [c for c, rank in ranks.items() if rank not in results]
            ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"ranks {sorted(ranks[c] for c in pending)} did not answer in {JOB_SECONDS} s")
            for connection in ready:
                try:
                    ok, value = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    self._fail(f"rank {ranks[connection]} died")  # type: ignore[index]
                if not ok:
                    self._fail(f"rank {ranks[connection]} raised:\n{value}")  # type: ignore[index]
                results[ranks[connection]] = value  # type: ignore[index]
        return [results[rank] for rank in sorted(results)]

    def _fail(self, reason: str) -> None:
        self.close()
        raise JobFailed(reason)


def _serve(connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            name, rank, world_size, store, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, _job(_resolve(name), rank, world_size, store, arguments)))
        except Exception:
            connection.send((False, traceback.format_exc()))


def _resolve(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    resolved: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return resolved


def _job(function: Callable[..., Any], rank: int, world_size: int, store: str, arguments: dict[str, Any]) -> Any:
    from trine.parallel import topology

    topology.join(rank, world_size, rank, init_method=f"file://{store}")
    try:
        return function(rank, world_size, **arguments)
    finally:
        topology.leave_topology()
        topology.leave()
        gc.collect()
