"""``trine launch status`` and ``trine launch stop``: what is known of a run, and how it ends early."""

from __future__ import annotations

from pathlib import Path

from ..configs.errors import RunError, UsageError
from ..pretrain import exit_state
from ..pretrain.checkpoints import folder
from ..pretrain.lock_holder import parse
from ..pretrain.run_lock import LOCK
from . import slurm_jobs


def print_status(run: Path) -> int:
    """Print how the last life ended, the jobs and the newest checkpoint. Returns 0; raises UsageError without a run."""
    _check(run)
    print(f"outcome     {_outcome(run)}")
    for line in _jobs(run):
        print(f"job         {line}")
    print(f"checkpoint  {folder.newest(_checkpoints(run)) or 'none yet'}")
    return 0


def ask_to_stop(run: Path) -> int:
    """Write the stop file, and cancel jobs that wait for their turn. Returns 0; raises UsageError where no run is."""
    _check(run)
    submission = slurm_jobs.recall(run)
    live = slurm_jobs.live_jobs(submission) if submission else []
    waiting = [job.number for job in live if job.state == "PENDING"]
    if waiting:
        slurm_jobs.cancel(waiting)
        print(f"cancelled {', '.join(waiting)}, which had not begun")
    if live and len(waiting) == len(live):
        return 0
    if not live and exit_state.read(run) is not None and _lock_of(run) is None:
        print(f"nothing to stop: {_outcome(run)}")
        return 0
    (run / exit_state.STOP_FILE).write_bytes(b"")
    print(f"wrote {run / exit_state.STOP_FILE}: the run saves after the step at hand, ends, and is not started again")
    return 0


def _lock_of(run: Path) -> bytes | None:
    try:
        return (run / LOCK).read_bytes()
    except OSError:
        return None


def _check(run: Path) -> None:
    if not any((run / name).exists() for name in ("config.yaml", "logs", slurm_jobs.FOLDER)):
        raise UsageError(f"{run} is no folder of a run: name the run.directory of one")


def _outcome(run: Path) -> str:
    state = exit_state.read(run)
    if state is None:
        holder = parse(_lock_of(run))
        return f"runs, or was killed: run.lock is held by {holder}" if holder else "was killed, or has not begun"
    again = "; the same command continues it" if state.resume else ""
    return f"{state.outcome} at step {state.step:,} of {state.steps:,}: {state.reason}{again}"


def _jobs(run: Path) -> list[str]:
    submission = slurm_jobs.recall(run)
    if submission is None:
        return []
    try:
        live = slurm_jobs.live_jobs(submission)
    except (RunError, UsageError) as error:
        return [str(error)]
    ended = [number for number in submission.jobs if number not in {job.number for job in live}]
    return [*map(str, live), *([f"{', '.join(ended)} ended"] if ended else [])]


def _checkpoints(run: Path) -> Path:
    """Where the run, by the configuration that it has left, keeps its checkpoints."""
    from ..configs.loading import load_config

    if not (run / "config.yaml").exists():
        return run / "checkpoints"
    return load_config(run / "config.yaml").checkpoint_directory
