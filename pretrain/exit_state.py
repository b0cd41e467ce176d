"""How a run ended, for whoever started it: ``exit_state.json`` in the run's folder, and the exit code."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..data_pipeline.durable import write_durably

NAME = "exit_state.json"
STOP_FILE = "stop"
REQUEUE = "requeue"
"""What a launcher writes into the stop file; a person leaves it empty."""
STOPPED = 75
"""Exit code of a run that was stopped before its end and has saved everything (EX_TEMPFAIL of sysexits: try again)."""

Outcome = Literal["finished", "stopped", "failed", "refused"]


@dataclass(frozen=True)
class ExitState:
    """The end of a run. After a kill there is none."""

    outcome: Outcome
    resume: bool
    """Whether the same command should be given again."""
    reason: str
    step: int
    """Steps done."""
    steps: int
    """Steps that the run is to have."""
    checkpoint: str | None
    """The newest checkpoint."""
    exit_code: int


def write(directory: Path, state: ExitState) -> None:
    """Leave ``state`` in the run's folder."""
    write_durably(directory / NAME, (json.dumps(asdict(state), indent=1) + "\n").encode())


def read(directory: Path) -> ExitState | None:
    """How the last run in ``directory`` ended; None where it did not say, or still runs."""
    try:
        fields: dict[str, Any] = json.loads((directory / NAME).read_bytes())
        return ExitState(**fields)
    except (OSError, ValueError, TypeError):
        return None


def clear(directory: Path) -> None:
    """Forget how the last run ended, since a new one begins, and what a launcher asked of it.

    A person's wish to stop stays: it may have been made while this run waited for its turn.
    """
    (directory / NAME).unlink(missing_ok=True)
    if asked(directory / STOP_FILE) == REQUEUE:
        honour_stop(directory)


def honour_stop(directory: Path) -> None:
    """Take the stop file away: what it asked for is done."""
    (directory / STOP_FILE).unlink(missing_ok=True)


def asked(stop_file: Path) -> str | None:
    """What a stop file asks for: ``REQUEUE``, or an end, in any other text; None where there is none."""
    try:
        return stop_file.read_bytes().decode(errors="replace").strip()
    except OSError:  # it is not there, or the disk does not answer, which others will tell
        return None
