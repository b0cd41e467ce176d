"""What a preparation tells about its progress."""

from __future__ import annotations


class Progress:
    """Hears how a preparation comes along. This one says nothing; subclasses show it to someone."""

    def say(self, sentence: str) -> None:
        """Something that the user may want to know."""

    def plan(self, files: int, total_bytes: int, chunks: int) -> None:
        """There are so many input files, of that size, in so many chunks."""

    def begin(self, total_bytes: int) -> None:
        """Tokenising begins, of inputs of that size."""

    def advance(self, input_bytes: int, documents: int, tokens: int, *, kept: bool) -> None:
        """So much more is done. ``kept``: it was found done, by an earlier preparation that was cut short."""

    def finish(self) -> None:
        """All is tokenised."""
