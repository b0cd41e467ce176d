"""A document: the unit that is read, held out, encoded and ended by a token of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and where it comes from.

    ``source`` is ``path``, in JSON Lines ``path@byte`` of the line's first byte (after decompression), and in Parquet
    ``path@row``: the same however the file is cut into pieces.
    """

    text: str
    source: str
