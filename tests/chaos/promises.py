"""What must hold after every life of a run, and at its end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass

from demo import INTERVAL, Run
from fault import Ending
from life import Life
from remains import Checkpoints, Lines, logged_steps, read_checkpoints, read_lines, read_samples, tensor_hashes

from trine.pretrain.exit_state import STOPPED

_FINISHED = "finished"


@dataclass(frozen=True)
class Before:
    """What was there before a life."""

    newest: int
    """The newest whole checkpoint."""
    had_checkpoint: bool


def broken_by(life: Life, code: int, ending: Ending | None, before: Before, *, disk_was_full: bool) -> Iterator[str]:
    """The promises that a life did not keep, whatever happened to it."""
    codes = ending.codes if ending else (0,)
    if code not in codes:
        yield f"it ended with exit code {code} instead of {' or '.join(map(str, codes))}"
    if "Traceback" in life.console:
        yield "its console shows a traceback"
    begun = life.start_step
    if begun is not None and begun != before.newest:
        yield f"it went on from step {begun}, and the newest whole checkpoint was of step {before.newest}"
    lines, checkpoints = read_lines(life.run.directory / "metrics.jsonl"), read_checkpoints(life.run)
    yield from _state(life, code, ending, checkpoints)
    yield from _checkpoints(life, checkpoints, before)
    if begun is not None:
        yield from _metrics(lines, killed=code == -signal.SIGKILL or code == 1)
        behind = max(lines.steps, default=0) - checkpoints.newest
        allowed = 0 if code in (0, STOPPED) else 2 * INTERVAL
        if behind > allowed and (code in (0, STOPPED) or not disk_was_full):
            yield f"{behind} steps are not saved, which is more than {allowed}"


def _state(life: Life, code: int, ending: Ending | None, checkpoints: Checkpoints) -> Iterator[str]:
    if life.start_step is not None and life.keeps_old_state:
        yield "exit_state.json is that of the life before"
    state = life.left_state
    outcomes = ending.outcomes if ending else (_FINISHED,)
    if (state["outcome"] if state else None) not in outcomes:
        yield f"exit_state.json says {state} instead of {' or '.join(map(str, outcomes))}"
    if state is None:
        return
    if state["exit_code"] != code:
        yield f"exit_state.json says exit code {state['exit_code']}, and it was {code}"
    resumes = ending is not None and ending.resumes and state["outcome"] != "refused"
    if state["resume"] != resumes:
        yield f"exit_state.json says resume={state['resume']} instead of {resumes}"
    newest = checkpoints.whole.get(checkpoints.newest)
    if state["checkpoint"] != (str(newest) if newest else None):
        yield f"exit_state.json names the checkpoint {state['checkpoint']}, and the newest whole one is {newest}"


def _checkpoints(life: Life, checkpoints: Checkpoints, before: Before) -> Iterator[str]:
    # Damage that a life has not come to see, because it ended while starting, is still there.
    if life.start_step is not None:
        yield from checkpoints.broken.values()
    if before.had_checkpoint and not checkpoints.whole:
        yield "no whole checkpoint is left"


def _metrics(lines: Lines, *, killed: bool) -> Iterator[str]:
    if lines.steps != list(range(1, len(lines.steps) + 1)):
        yield f"metrics.jsonl has a gap or a repetition: {_first_break(lines.steps)}"
    if lines.torn and not (killed and lines.cut and len(lines.torn) == 1):
        yield f"metrics.jsonl has torn lines: {lines.torn}"


def differences(run: Run, reference: Run, *, disk_was_full: bool) -> Iterator[str]:
    """Where a finished run is not what the fault-free one is."""
    ours, theirs = (read_lines(one.directory / "metrics.jsonl") for one in (run, reference))
    if ours.steps != list(range(1, run.steps + 1)):
        yield f"metrics.jsonl has a gap or a repetition: {_first_break(ours.steps)}"
    for step, expected in theirs.losses.items():
        if ours.losses.get(step) != expected:
            yield f"the first step that differs is {step}: {ours.losses.get(step)} instead of {expected}"
            break
    if ours.evaluations != theirs.evaluations:
        yield f"the evaluations are {ours.evaluations} instead of {theirs.evaluations}"
    if not same_samples(run, reference):
        yield "the sample ids of some step differ from those of the fault-free run"
    last = [tensor_hashes(read_checkpoints(one).whole[one.steps]) for one in (run, reference)]
    if last[0] != last[1]:
        yield "the tensors of the last checkpoint differ from those of the fault-free run"
    yield from _board(run, disk_was_full)


def same_samples(run: Run, reference: Run) -> bool:
    """Whether every rank has read the same samples at every step, each once."""
    return read_samples(run) == read_samples(reference)


def _board(run: Run, disk_was_full: bool) -> Iterator[str]:
    steps = logged_steps(run)
    expected = [step for step in range(1, run.steps + 1) if step in set(steps)] if disk_was_full else list(range(1, run.steps + 1))
    if steps != expected:
        yield f"TensorBoard has a gap or a repetition: {_first_break(steps)}"


def _first_break(steps: list[int]) -> str:
    pairs = [f"{step} after {former}" for former, step in zip([0, *steps], steps, strict=False) if step != former + 1]
    return ", ".join(pairs[:3]) or f"{len(steps)} steps"
