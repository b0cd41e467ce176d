"""What the verification of prepared data finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a folder of prepared data."""

    file: str
    """Name of the file in the folder."""
    sentence: str
    """What is wrong with it."""
    span: range | None = None
    """The first bytes of the file that are wrong or, beyond its end, missing, where that can be told."""
    is_warning: bool = False
    """Whether runs are not affected."""

    def __str__(self) -> str:
        """``file, bytes first-last: sentence``, both bytes included."""
        where = "" if self.span is None else f", bytes {self.span.start}-{self.span.stop - 1}"
        return f"{self.file}{where}: {'warning: ' if self.is_warning else ''}{self.sentence}"
