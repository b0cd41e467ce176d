"""The jobs of a run: submitted, remembered in ``slurm/job.json`` of the run's folder, and asked about."""

from __future__ import annotations

import fcntl
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..configs.errors import RunError, UsageError
from ..data_pipeline.durable import write_durably

FOLDER, RECORD, SCRIPT, LIVES = "slurm", "job.json", "job.sbatch", "lives"
"""Names in the run's folder, and in that folder in it."""

_CALL_S = 120.0
_ENDED = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
)  # fmt: skip


@dataclass(frozen=True)
class Submission:
    """The jobs that one command has submitted for a run."""

    name: str
    jobs: tuple[str, ...]


@dataclass(frozen=True)
class JobState:
    """What Slurm tells of a job that has not ended."""

    number: str
    state: str
    nodes: str
    """As Slurm writes lists; empty while it waits."""
    reason: str
    """Why it waits."""
    restarts: str

    def __str__(self) -> str:
        where = f" on {self.nodes}" if self.nodes else f" ({self.reason})" if self.reason else ""
        again = f", requeued {self.restarts} times" if self.restarts not in ("", "0") else ""
        return f"{self.number} {self.state}{where}{again}"


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep others from submitting for the run whose folder of jobs this is. Raises UsageError where one does."""
    with (folder / "submit.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another command submits this run now ({file.name} is locked): wait for it") from None
        except OSError:  # a file system without locks
            pass
        yield


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises RunError where the disk fails."""
    try:
        write_durably(path, text.encode())
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from error


def submit(script: Path, name: str, chain: int) -> tuple[str, ...]:
    """Hand the script to sbatch, ``chain`` times; returns the numbers of the jobs, which are remembered beside it.

    Raises:
        UsageError: there is no sbatch here.
        RunError: Slurm does not take the script, or a later job of the chain, or they cannot be remembered; those
            that it took are cancelled.
    """
    waiting = ["--dependency=singleton"] if chain > 1 else []
    jobs: list[str] = []
    for _ in range(chain):
        told = _call("sbatch", "--parsable", *waiting, str(script))
        if told.returncode != 0:
            if jobs:
                _call("scancel", *jobs)
            raise RunError(f"sbatch refuses {script}: {_last_line(told.stderr)}")
        jobs.append(told.stdout.strip().partition(";")[0])  # a cluster's name may follow
        try:
            _remember(script.with_name(RECORD), Submission(name, tuple(jobs)))
        except RunError:
            _call("scancel", *jobs)  # a job that nobody knows of could be submitted a second time
            raise
    return tuple(jobs)


def recall(run: Path) -> Submission | None:
    """What was submitted last for the run in this folder; None where nothing was."""
    try:
        fields: dict[str, Any] = json.loads((run / FOLDER / RECORD).read_bytes())
        return Submission(str(fields["name"]), tuple(map(str, fields["jobs"])))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        path = run / FOLDER / RECORD
        raise UsageError(
            f"{path} cannot be read ({error}): see with squeue whether the run has a job, and remove {path.name}"
        ) from error


def live_jobs(submission: Submission) -> list[JobState]:
    """Those of its jobs that wait, run or end just now.

    Raises UsageError where there is no Slurm here, RunError where it does not answer.
    """
    states = [_state(number, submission.name) for number in submission.jobs]
    return [state for state in states if state is not None]


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs. Raises RunError where Slurm does not."""
    told = _call("scancel", *jobs)
    if told.returncode != 0:
        raise RunError(f"scancel {' '.join(jobs)} fails: {_last_line(told.stderr)}")


def _state(number: str, name: str) -> JobState | None:
    told = _call("scontrol", "-o", "show", "job", number)
    if told.returncode != 0:
        if "Invalid job id" in told.stderr:  # Slurm forgets jobs some minutes after their end
            return None
        raise RunError(f"scontrol does not tell of job {number}: {_last_line(told.stderr)}")
    fields = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", told.stdout))
    # Numbers begin anew when a cluster is set up again.
    if fields.get("JobName") != name or fields.get("JobState", "") in _ENDED:
        return None
    nodes = fields.get("NodeList", "").replace("(null)", "")
    return JobState(number, fields.get("JobState", ""), nodes, fields.get("Reason", ""), fields.get("Restarts", ""))


def _remember(path: Path, submission: Submission) -> None:
    write(path, json.dumps(asdict(submission), indent=1) + "\n")


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_CALL_S, check=False)
    except FileNotFoundError:
        raise UsageError(
            f"{command[0]} is not on this machine: submit where Slurm is, or print the script without --submit and "
            "take it there"
        ) from None
    except subprocess.TimeoutExpired:
        raise RunError(f"{command[0]} has not answered for {_CALL_S:g} s: is Slurm's controller up?") from None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it does not say why"])[-1]
