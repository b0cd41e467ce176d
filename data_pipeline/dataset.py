"""A split as a random-access sequence of training windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..configs.errors import RunError, UsageError
from .shards.manifest import Manifest, load_manifest, token_dtype
from .shards.member_index import index_name
from .shards.reader import ShardReader
from .storage.folder import open_folder
from .storage.shard_cache import cached


@dataclass(frozen=True, slots=True)
class Sample:
    """One window of a split."""

    tokens: NDArray[np.int64]
    """(S + 1,): the inputs are ``tokens[:-1]`` and the labels ``tokens[1:]``."""
    document_starts: NDArray[np.int64]
    """Increasing positions in [0, S) at which a document begins."""

    def document_start_per_token(self) -> NDArray[np.int64]:
        """(S,): for each input the position of its document's first token, 0 where that lies before the window."""
        return start_per_token(self.document_starts, self.tokens.size - 1)

    def positions(self) -> NDArray[np.int64]:
        """(S,): for each input its position in its document, counted from the window's start if that is later."""
        return np.arange(self.tokens.size - 1) - self.document_start_per_token()


def start_per_token(document_starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """(length,): for each token the last of ``document_starts`` that is not behind it, or 0."""
    begins = np.zeros(length, np.int64)
    begins[document_starts] = document_starts
    return np.maximum.accumulate(begins)


class TokenDataset:
    """The windows of ``sequence_length`` + 1 tokens of a split, with stride ``sequence_length``.

    The documents of the split lie one behind the other, each with the token that ends it. Sample g starts at
    token g * sequence_length, so every token but the first is a label once and the remainder at the end is
    not read. ``location`` is a folder, or the http(s):// or s3:// URL of one, of which the parts that are read are kept
    under ``cache`` (see ``storage.shard_cache``). Opening reads the manifest, unless it is given, and touches no shard,
    for there may be thousands of both shards and ranks. Several threads may read at once.

    Raises UsageError for a folder without prepared data, a split that is not there and a sequence length that
    is too long for it; RunError when the location cannot be read. A sample that touches a shard which is missing, cut
    or damaged raises Damage (see ``shards.reader``).
    """

    def __init__(
        self,
        location: str | Path,
        split: str,
        sequence_length: int,
        *,
        cache: Path | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        folder = open_folder(location)
        self.location = folder.location
        self.manifest = load_manifest(folder) if manifest is None else manifest
        self.fingerprint = self.manifest.fingerprint
        """Identity of the prepared data (``Manifest.fingerprint``)."""
        self.split = split
        self.sequence_length = sequence_length
        self._length = self._count_windows()
        self._folder = cached(folder, self.fingerprint, cache)
        self._records = self.manifest.splits[split]
        dtype = token_dtype(self.manifest.dtype)
        self._shards = [ShardReader(self._folder, record, dtype) for record in self._records]
        self._ends = np.cumsum([record.tokens for record in self._records], dtype=np.int64)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index`` in [0, len). Raises IndexError outside it, Damage when it is damaged."""
        tokens = np.empty(self.sequence_length + 1, np.int64)
        return Sample(tokens, self.read_into(tokens, index))

    def read_into(self, tokens: NDArray[np.int64], index: int, *, documents: bool = True) -> NDArray[np.int64]:
        """Read sample ``index`` into ``tokens`` (S + 1,), and return its ``document_starts`` if they are asked for.

        Raises as indexing does.
        """
        starts: list[NDArray[np.int64]] = []
        filled = 0
        for number, start, stop in self._ranges(index):
            for piece, piece_starts in self._shards[number].read(start, stop, documents=documents):
                tokens[filled : filled + piece.size] = piece
                starts.append(piece_starts + filled)
                filled += piece.size
        document_starts = np.concatenate(starts)
        return document_starts[document_starts < self.sequence_length]

    def check_files(self) -> None:
        """Compare the presence and size of all files of the split with the manifest, by one listing where there is one.

        Raises RunError with the first file that is wrong and their number. For one rank at the start of a run:
        contents are verified as they are read.
        """
        expected: dict[str, int | None] = {}
        for record in self._records:
            expected[record.name] = record.bytes
            expected[index_name(record.name)] = None
        try:
            found = self._folder.sizes(expected)
        except OSError as error:
            raise RunError(f"the files of {self.location} cannot be listed ({error.strerror or error})") from error
        wrong = [name for name, size in expected.items() if name not in found or size not in (None, found[name])]
        if wrong:
            name = wrong[0]
            size = f"has {found[name]} bytes and the manifest says {expected[name]}" if name in found else "is missing"
            raise RunError(
                f"{self._folder.address(name)} {size} ({len(wrong)} of the {len(expected)} files of the split "
                f"{self.split} are wrong); restore them from a copy, or prepare the data again"
            )

    def _ranges(self, index: int) -> Iterator[tuple[int, int, int]]:
        """For each shard that holds some of a sample: its number, and the half-open range of its tokens."""
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} is outside [0, {self._length})")
        start = index * self.sequence_length
        stop = start + self.sequence_length + 1
        number = int(self._ends.searchsorted(start, "right"))
        while start < stop:
            end = int(self._ends[number])
            first = end - self._records[number].tokens
            yield number, start - first, min(stop, end) - first
            start = end
            number += 1

    def _count_windows(self) -> int:
        split, tokens, length = self.split, self.manifest.tokens(self.split), self.sequence_length
        if split not in self.manifest.splits:
            raise UsageError(
                f"{self.location} has no split {split}, only {' and '.join(self.manifest.splits)}; "
                "prepare the data with a validation_fraction above 0 if it is to have one"
            )
        if length < 1:
            raise UsageError(f"sequence_length={length} is not a length; choose 1 or more")
        if tokens < length + 1:
            raise UsageError(
                f"sequence_length={length} is too long for the split {split} of {self.location}, which has "
                f"{tokens} tokens; choose {tokens - 1} or less, or prepare more data"
            )
        return (tokens - 1) // length
