"""What a chaos run tells: a table for people, and the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from campaign import Told

_HEADER = ("fault", "life", "step", "answer", "exit", "gone s", "repeated", "recovery s")
_ANSWER = 76


def table(told: Sequence[Told]) -> str:
    """One line for each fault."""
    rows = [_HEADER, *map(_row, told)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def summary(document: dict[str, Any]) -> str:
    """The totals, and what was not as promised."""
    totals = document["totals"]
    lines = [
        f"faults       {totals['faults']}, of {totals['kinds']} kinds, in {totals['lives']} lives, {totals['seconds']:.0f} s",
        f"layout       {document['layout']}, {document['steps']} steps, {totals['repeated']} of them done again; seed {document['seed']}",
        f"goodput      {_percent(totals['goodput'])} as the trainer reports it",
        f"final loss   {totals['loss']} (fault-free {totals['loss_fault_free']})",
        f"sample ids   {'identical' if totals['same_samples'] else 'NOT identical'}",
        f"everything   {'identical to the last bit' if not document['problems'] else 'NOT as promised:'}",
    ]
    return "\n".join([*lines, *(f"  - {problem}" for problem in document["problems"])])


def line(told: Told) -> str:
    """A fault as it happens."""
    end = f" -> {told.code}" if told.code is not None else ""
    mark = "".join(f"\n      !! {problem}" for problem in told.problems)
    return f"life {told.life:2d} step {told.step:3d} | {told.fault}: {told.done}{end} | {told.answer}{mark}"


def _row(told: Told) -> tuple[str, ...]:
    answer = told.answer if len(told.answer) <= _ANSWER else f"{told.answer[: _ANSWER - 3]}..."
    return (
        told.fault, str(told.life), str(told.step), answer, _text(told.code), _text(told.gone_s), _text(told.repeated),
        _text(told.recovery_s),
    )  # fmt: skip


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"
