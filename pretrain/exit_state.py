"""How a run ended, for whoever started it: ``exit_state.json`` in the run's folder, and the exit code."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..data_pipeline.durable import write_durably

NAME = "exit_state.json"
STOP_FILE = "stop"
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
    """Forget how the last run ended, and an old wish to stop, since a new one begins."""
    for name in (NAME, STOP_FILE):
        (directory / name).unlink(missing_ok=True)
