"""How ``trine checkpoint`` writes what it found: numbers, times, lines and tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TextIO

from .targets import STANDARD_OUTPUT

UNKNOWN = "-"


def stream_for_text(json_target: str | None) -> TextIO:
    """Where text goes: standard output is for the JSON alone where that is asked for."""
    return sys.stderr if json_target == STANDARD_OUTPUT else sys.stdout


def say(lines: Iterable[str], stream: TextIO | None = None) -> None:
    """Print lines; names from a checkpoint that would move a terminal's cursor show as question marks."""
    for line in lines:
        print("".join(c if c.isprintable() else "?" for c in line), file=stream or sys.stdout)


def size(number: float) -> str:
    """Bytes in the unit that people read."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def integer(number: int | None) -> str:
    """A whole number that may not be known."""
    return UNKNOWN if number is None else f"{number:,}"


def number(value: float | None) -> str:
    """A number that may not be known."""
    return UNKNOWN if value is None else f"{value:g}"


def count(number: int, what: str) -> str:
    """So many of something."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def local_time(seconds: float) -> str:
    """A file's time for people."""
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


def utc_time(seconds: float) -> str:
    """A file's time for machines."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Rows under titles; the columns whose positions are in ``right`` end on one line, the others begin on one."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    return [
        "  ".join(f"{c:>{w}}" if n in right else f"{c:<{w}}" for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        .rstrip()
        for row in (titles, *rows)
    ]  # fmt: skip
