"""All ranks of a run on this machine: started together, ended together, and one sentence when one fails."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..pretrain import exit_state
from ..pretrain.exit_state import STOPPED, ExitState
from .environment import LAUNCHED_LOCALLY
from .failures import recorded_failures, root_cause
from .machine import usable_cores
from .rank_log import log_path, make_log_directory

_THIS_HOST = "127.0.0.1"
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_GIB = 1 << 30


def launch_local(
    arguments: Sequence[str],
    processes: int,
    log_directory: Path,
    *,
    run_directory: Path | None = None,
    checkpoint_directory: Path | None = None,
    module: str = f"{__package__}.worker",
) -> int:
    """Run ``python -m module *arguments`` as ``processes`` ranks of this machine and wait for them.

    When one fails the others are ended: by SIGTERM, and after 30 s by SIGKILL. Standard error then names the
    rank that failed first, how, and its log in ``log_directory``; when ``checkpoint_directory`` holds a
    checkpoint, it says that the run can be resumed. Signals are handed on to the ranks, which have 30 s to save
    what they must, and ranks do not outlive the launcher. Must be called in the main thread.

    Returns:
        0 when every rank succeeded, 75 when the run in ``run_directory`` says that it was stopped before its end and
        has saved everything, 2 when the first failure was a UsageError, 128 + N when signal N ended the run and no
        rank failed to stop as it should, else 1.

    Raises:
        UsageError: ``log_directory`` cannot be made.
    """
    make_log_directory(log_directory)
    before = exit_state.read(run_directory) if run_directory else None
    with tempfile.TemporaryDirectory(prefix="trine-") as errors:
        config = _elastic_config(processes, errors)
        variables = rank_environment(processes)
        try:
            with _signal_handlers_kept(), _environment(variables), _elastic_log(log_directory):
                _run_ranks(config, ["-m", module, *arguments])
            return STOPPED if _was_stopped(run_directory, before) else 0
        except ChildFailedError as error:
            _end_process_groups(error.failures)
            code, sentences = _failure(error.failures, processes, log_directory)
        except SignalException as stopped:
            if _was_stopped(run_directory, before):
                return STOPPED
            code, sentences = 128 + stopped.sigval, [f"stopped by {stopped.sigval.name}"]
            if failures := recorded_failures(Path(errors)):  # of ranks that could not save
                code, sentences = _failure(failures, processes, log_directory)
        except KeyboardInterrupt:
            code, sentences = 128 + signal.SIGINT, ["stopped by SIGINT"]
    if code != 2:
        sentences[-1] += _resume_hint(checkpoint_directory)
    for sentence in sentences:
        print(f"trine: {sentence}", file=sys.stderr, flush=True)
    return code


def rank_environment(processes: int) -> dict[str, str]:
    """Environment variables for ``processes`` ranks that share this machine; none that the user has set."""
    variables = {"OMP_NUM_THREADS": str(max(1, usable_cores() // processes))}
    if not torch.cuda.is_available():
        # glibc would give large freed tensors back to the kernel, and pay for each again in page faults.
        variables["MALLOC_MMAP_THRESHOLD_"] = str(4 * _GIB)
        variables["MALLOC_TRIM_THRESHOLD_"] = str(8 * _GIB)
        if sys.platform == "linux":
            # Otherwise gloo looks up the host's name, which need not resolve on a laptop.
            variables["GLOO_SOCKET_IFNAME"] = "lo"
    return {name: value for name, value in variables.items() if name not in os.environ}


def _elastic_config(processes: int, errors: str) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{_THIS_HOST}:0",
        rdzv_configs={"is_host": True},
        local_addr=_THIS_HOST,
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=errors),
        signals_to_handle=",".join(_signals_to_handle()),
    )


def _run_ranks(config: LaunchConfig, arguments: Sequence[str]) -> None:
    launch: Any = elastic_launch(config, sys.executable)
    # Elastic replaces ${local_rank} in arguments; $$ stands for a dollar that is meant.
    launch(*(argument.replace("$", "$$") for argument in arguments))


def _signals_to_handle() -> list[str]:
    """What is ignored stays ignored: nohup protects a run from SIGHUP that way."""
    return [number.name for number in _HANDLED if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _environment(additions: Mapping[str, str]) -> Iterator[None]:
    """Elastic gives ranks the launcher's environment, and changes it."""
    before = dict(os.environ)
    os.environ.update(additions, **{LAUNCHED_LOCALLY: "1"})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _elastic_log(directory: Path) -> Iterator[None]:
    """Send what torch's launcher logs to a file, so that our sentence is the last one on the console."""
    logger = logging.getLogger("torch.distributed.elastic")
    # A log that cannot be written, on a full disk say, must not bury the sentence about it in tracebacks.
    logging.raiseExceptions = False
    handler = logging.FileHandler(directory / "launcher.log", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):  # a full disk
            handler.close()
        logger.propagate = propagated


def _end_process_groups(failures: Mapping[int, ProcessFailure]) -> None:
    """End what failed ranks started: each leads a process group, and one that was killed ended nothing."""
    for failure in failures.values():
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(failure.pid, signal.SIGKILL)


def _failure(failures: Mapping[int, ProcessFailure], processes: int, log_directory: Path) -> tuple[int, list[str]]:
    """The exit code, and the sentences for the user."""
    cause = root_cause(failures)
    if cause.usage is not None:
        return 2, [cause.usage]
    log = log_path(log_directory, cause.rank)
    return 1, [f"rank {cause.rank} of {processes} {cause.how}", f"its log is {log}"]


def _was_stopped(run_directory: Path | None, before: ExitState | None) -> bool:
    """Whether the run says so, and not the one ``before`` it; it has told the user on its own."""
    state = exit_state.read(run_directory) if run_directory else None
    return state is not None and state.outcome == "stopped" and state != before


def _resume_hint(checkpoint_directory: Path | None) -> str:
    if checkpoint_directory is None or not any(checkpoint_directory.glob("step-*[0-9]")):
        return ""
    return "; the same command resumes from the newest checkpoint"
