"""A run as its launcher sees it: one at a time in its folder, watched, and with a word about how it ended."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..configs.checks import check_layout
from ..configs.errors import RunError, UsageError
from ..configs.loading import set_vocabulary
from ..configs.schema import Config
from ..data_pipeline.opening import read_prepared
from ..parallel.agreement import done_by_first_rank, wait_for_all
from ..parallel.determinism import use_deterministic_kernels
from ..parallel.topology import Topology, build_topology, join, leave, leave_topology
from . import exit_state
from .checkpoints import folder
from .exit_state import STOPPED, ExitState, Outcome
from .place import Place
from .run_lock import HeldLocks, RunLock
from .stopping import StopRequests, listen_to_signals
from .trainer import Trainer
from .watch.hang import HangWatchdog
from .watch.pulse import Pulse

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outside:
    """How a rank reaches its user, and how it ends when its main thread cannot."""

    tell: Callable[[str], None]
    """Prints a line on the console."""
    end: Callable[[RunError], object]
    """Ends the process."""
    log: Path | None = None
    """The rank's log."""


def pretrain(config: Config, place: Place, outside: Outside) -> int:
    """One rank's whole run, from joining the process group to leaving it.

    Returns:
        0 when all steps are done, ``STOPPED`` when the run was stopped before and has saved everything.

    Raises:
        UsageError: the configuration does not fit the ranks, the data or the run's checkpoint, or another run is in
            its folder.
        RunError: the run cannot go on.
    """
    if config.train.deterministic:
        use_deterministic_kernels()
    prepared = read_prepared(config.data)
    config = set_vocabulary(config, prepared.vocabulary_size)
    layout, timeout = check_layout(config, place.world_size), config.watch.collective_timeout
    device = join(place.rank, place.world_size, place.local_rank, timeout=timeout)
    topology = build_topology(layout, device, timeout)
    directory, pulse = config.run.directory, Pulse()
    listen_to_signals()
    with ExitStack() as stack:
        lock = _hold(config, topology, stack)
        stack.enter_context(_watchdog(config, place, pulse, outside))
        stop_file = directory / exit_state.STOP_FILE if topology.rank == 0 else None
        requests = StopRequests(stop_file, config.train.max_wall_time)
        with _failures_noted(config, lock):
            trainer = Trainer(config, topology, place, prepared, pulse=pulse, lock=lock, requests=requests)
            trainer.run()
        state = done_by_first_rank(lambda: _left_word(trainer, lock))
    # Launchers end all ranks when one ends with another number than 0: rank 0 must have done all that it does by then.
    wait_for_all()
    leave_topology()
    leave()
    return state.exit_code


def _hold(config: Config, topology: Topology, stack: ExitStack) -> HeldLocks | None:
    """Have rank 0 lock the run's folder and that of its checkpoints, and forget how the last run there ended."""
    locks: list[RunLock] = []

    def take() -> None:
        locks.append(stack.enter_context(RunLock.acquire(config.run.directory)))
        if not config.checkpoint_directory.is_relative_to(config.run.directory):
            locks.append(stack.enter_context(_lock_of_checkpoints(config.checkpoint_directory)))
        exit_state.clear(config.run.directory)

    done_by_first_rank(take)
    return HeldLocks(*locks) if topology.rank == 0 else None


def _lock_of_checkpoints(directory: Path) -> RunLock:
    try:
        return RunLock.acquire(directory)
    except (UsageError, RunError) as error:  # which speaks of the folder by the key that it mostly has
        raise type(error)(str(error).replace("run.directory", "checkpoint.directory")) from error


def _watchdog(config: Config, place: Place, pulse: Pulse, outside: Outside) -> HangWatchdog:
    port = int(os.environ.get("MASTER_PORT") or 0)
    address = (os.environ["MASTER_ADDR"], port) if port and place.world_size > 1 else None
    seconds = config.watch.hang_seconds
    return HangWatchdog(pulse, place, seconds, address, tell=outside.tell, end=outside.end, log=outside.log)


@contextmanager
def _failures_noted(config: Config, lock: HeldLocks | None) -> Iterator[None]:
    """Within it a failure is noted in the run's folder by rank 0, on its way to whoever handles it."""
    try:
        yield
    except Exception as error:
        if lock is not None:
            refused = isinstance(error, UsageError)
            reason, code = _reason(error), 2 if refused else 1
            _leave_word(config.run.directory, lock, _state(config, "refused" if refused else "failed", reason, code))
        raise


def _reason(error: Exception) -> str:
    if isinstance(error, (UsageError, RunError)):
        return str(error).partition("\n")[0]
    return f"rank 0 lost another rank, or failed by itself ({type(error).__name__}): the logs of the ranks say more"


def _left_word(trainer: Trainer, lock: HeldLocks | None) -> ExitState:
    """Rank 0's part of an orderly end."""
    state = _end_of(trainer)
    if lock is not None:
        _leave_word(trainer.config.run.directory, lock, state)
        if not trainer.finished:
            exit_state.honour_stop(trainer.config.run.directory)
    return state


def _end_of(trainer: Trainer) -> ExitState:
    config = trainer.config
    if trainer.finished:
        return _state(config, "finished", "all steps are done", 0, step=trainer.step)
    state = _state(config, "stopped", trainer.stop.reason, STOPPED, step=trainer.step)
    return replace(state, resume=trainer.stop.resumes)


def _state(config: Config, outcome: Outcome, reason: str, exit_code: int, step: int | None = None) -> ExitState:
    newest = folder.newest(config.checkpoint_directory)
    return ExitState(
        outcome=outcome,
        resume=outcome in ("stopped", "failed"),
        reason=reason,
        step=step if step is not None else folder.step_of(newest) if newest else 0,
        steps=config.train.steps,
        checkpoint=str(newest) if newest else None,
        exit_code=exit_code,
    )


def _leave_word(directory: Path, lock: HeldLocks, state: ExitState) -> None:
    """Write how the run ended, unless the folder is another run's by now."""
    with suppress(RunError):
        lock.check()
        try:
            exit_state.write(directory, state)
        except OSError as error:
            logger.warning("%s cannot be written: %s", directory / exit_state.NAME, error.strerror)
