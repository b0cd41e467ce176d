"""Which rank failed first, and the sentence about it: one failure brings down the ranks that wait for it."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_USAGE = 2
# The launcher's own SIGKILL follows its SIGTERM, and so the first failure, after 30 seconds.
_ESCALATION_S = 25
_COMMUNICATION = re.compile(
    r"Connection (closed by|reset by|refused)|Broken pipe|connectFullMesh|gloo/transport|pair closure"
    r"|recvBytes|Socket Timeout|Timed out waiting|nccl(Remote|System|Internal)Error|NCCL (error|communicator)"
    r"|Dist(Backend|Network|Store)Error"
)


@dataclass(frozen=True)
class RootCause:
    """The failure that the others follow from."""

    rank: int
    how: str
    """What happened to the rank, on one line, to be read after its name."""
    usage: str | None
    """The whole text of a UsageError, if it was one."""


def root_cause(failures: Mapping[int, ProcessFailure]) -> RootCause:
    """The first of ``failures``, which are by global rank and in the order in which the launcher saw them.

    A rank that a signal killed is preferred, since its peers lose their connections within milliseconds; then
    one that failed by itself; then the earliest. What the launcher did to end the others is no cause.
    """
    first_seen = next(iter(failures))
    # By the clock of this process and the ranks, which may be another than that of the files.
    start = min(failure.timestamp for failure in failures.values())

    def preference(rank: int) -> tuple[int, float, int]:
        failure = failures[rank]
        if failure.exitcode >= 0:
            kind = 2 if _COMMUNICATION.search(_trace(failure)) else 1
        elif rank == first_seen:
            kind = 0  # the launcher ends ranks only after it has seen a failure
        else:
            kind = 3 if _ended_by_launcher(failure, start) else 0
        return kind, _time(failure), rank

    rank = min(failures, key=preference)
    failure = failures[rank]
    return RootCause(rank, _how(failure), _usage(failure))


def recorded_failures(directory: Path) -> dict[int, ProcessFailure]:
    """The failures that ranks have recorded below torch's folder of errors, but for lost connections, by rank.

    They are all there is where a signal ended the launch: torch then does not tell how its ranks ended.
    """
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    found: dict[int, ProcessFailure] = {}
    for path in sorted(directory.glob("*/attempt_*/*/error.json")):
        rank = int(path.parent.name)
        try:
            failure = ProcessFailure(local_rank=rank, pid=-1, exitcode=1, error_file=str(path))
        except (OSError, ValueError, KeyError, TypeError):  # a rank that was killed while it wrote
            continue
        if _message(failure).startswith("UsageError: "):
            failure.exitcode = _USAGE
        if not _COMMUNICATION.search(_trace(failure)):
            found[rank] = failure
    return found


def _ended_by_launcher(failure: ProcessFailure, start: float) -> bool:
    late = failure.timestamp - start > _ESCALATION_S
    return failure.exitcode == -signal.SIGTERM or (failure.exitcode == -signal.SIGKILL and late)


def _how(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        number = -failure.exitcode
        hint = ", as happens when memory runs out" if number == signal.SIGKILL else ""
        return f"was killed by signal {number} ({failure.signal_name()}){hint}"
    kind, _, message = _message(failure).partition(": ")
    if not message:
        return f"ended with exit code {failure.exitcode} and no message"
    line = message.strip().partition("\n")[0]
    return f"failed: {line}" if kind == "RunError" else f"failed: {kind}: {line}"


def _usage(failure: ProcessFailure) -> str | None:
    kind, _, message = _message(failure).partition(": ")
    return message if failure.exitcode == _USAGE and kind == "UsageError" else None


def _message(failure: ProcessFailure) -> str:
    """``TYPE: text`` of the exception that the rank recorded; empty if it recorded none."""
    recorded = failure.error_file_data.get("message")
    return str(recorded["message"]) if isinstance(recorded, dict) else ""


def _trace(failure: ProcessFailure) -> str:
    recorded = failure.error_file_data.get("message")
    return str(recorded["extraInfo"]["py_callstack"]) if isinstance(recorded, dict) else ""


def _time(failure: ProcessFailure) -> float:
    """Seconds since the epoch; what a rank recorded is dated by the file, for it notes whole seconds only."""
    try:
        return Path(failure.error_file).stat().st_mtime
    except OSError:
        return float(failure.timestamp)
