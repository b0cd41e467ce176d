"""A split as a random-access sequence of training windows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..configs.errors import UsageError
from .manifest import load_manifest, token_dtype
from .shard_reader import Piece, ShardReader, map_file

_OPEN_SHARDS = 256
"""A mapped file holds a descriptor, and a process may have as few as 1024 of them."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One window of a split."""

    tokens: NDArray[np.int64]
    """(S + 1,): the inputs are ``tokens[:-1]`` and the labels ``tokens[1:]``."""
    document_starts: NDArray[np.int64]
    """Increasing positions in [0, S) at which a document begins."""

    def document_start_per_token(self) -> NDArray[np.int64]:
        """(S,): for each input the position of its document's first token, 0 where that lies before the window."""
        begins = np.zeros(self.tokens.size - 1, np.int64)
        begins[self.document_starts] = self.document_starts
        return np.maximum.accumulate(begins)


class TokenDataset:
    """The windows of ``sequence_length`` + 1 tokens of a split, with stride ``sequence_length``.

    The documents of the split lie one behind the other, each with the token that ends it. Sample g starts at
    token g * sequence_length, so every token but the first is a label once and the remainder at the end is
    not read. The shards are mapped into memory and each member is verified when it is first touched.

    Raises UsageError for a folder without prepared data, a split that is not there and a sequence length that
    is too long for it; RunError for a shard that is missing, cut or damaged, the last when a sample touches
    it.
    """

    def __init__(self, directory: Path, split: str, sequence_length: int) -> None:
        self.manifest = load_manifest(directory)
        self.sequence_length = sequence_length
        self._length = self._count_windows(directory, split)
        records = self.manifest.splits[split]
        dtype = token_dtype(self.manifest.dtype)
        mapped = lru_cache(_OPEN_SHARDS)(map_file)
        self._shards = [ShardReader(directory / record.name, record, dtype, mapped) for record in records]
        self._ends = np.cumsum([record.tokens for record in records], dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        """Identity of the prepared data (``Manifest.fingerprint``)."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index`` in [0, len). Raises IndexError outside it, RunError when it is damaged."""
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} is outside [0, {self._length})")
        length = self.sequence_length
        tokens = np.empty(length + 1, np.int64)
        starts: list[NDArray[np.int64]] = []
        filled = 0
        for piece, piece_starts in self._pieces(index * length, length + 1):
            tokens[filled : filled + piece.size] = piece
            starts.append(piece_starts + filled)
            filled += piece.size
        document_starts = np.concatenate(starts)
        return Sample(tokens, document_starts[document_starts < length])

    def _pieces(self, start: int, count: int) -> list[Piece]:
        pieces: list[Piece] = []
        number = int(np.searchsorted(self._ends, start, side="right"))
        while count:
            end = int(self._ends[number])
            first = int(self._ends[number - 1]) if number else 0
            stop = min(start + count, end)
            pieces.extend(self._shards[number].read(start - first, stop - first))
            count -= stop - start
            start = stop
            number += 1
        return pieces

    def _count_windows(self, directory: Path, split: str) -> int:
        if split not in self.manifest.splits:
            raise UsageError(
                f"{directory} has no split {split}, only {' and '.join(self.manifest.splits)}; "
                "prepare the data with a validation_fraction above 0 if it is to have one"
            )
        tokens, length = self.manifest.tokens(split), self.sequence_length
        if length < 1:
            raise UsageError(f"sequence_length={length} is not a length; choose 1 or more")
        if tokens < length + 1:
            raise UsageError(
                f"sequence_length={length} is too long for the split {split} of {directory}, which has "
                f"{tokens} tokens; choose {tokens - 1} or less, or prepare more data"
            )
        return (tokens - 1) // length
