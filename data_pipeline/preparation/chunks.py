"""The plan of a preparation: which pieces of the inputs are worked on together, whoever does the work."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate, chain, groupby, repeat

from ..corpus.sources import InputFile, Piece, divide

CHUNKS = 256
"""What a corpus is cut into by default, as far as the bounds below allow: enough to keep many processes busy."""
SMALLEST_CHUNK = 1 << 20
LARGEST_CHUNK = 1 << 29
"""Some minutes of one core: what a kill costs each process."""

_READERS = 16


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive pieces of the inputs. Its shards depend on it alone, and not on what else is prepared."""

    number: int
    pieces: tuple[Piece, ...]
    bytes: int
    """How much of the input files it is."""


def default_chunk_bytes(corpus_bytes: int) -> int:
    """The size of a chunk for inputs of that size in all."""
    return min(max(corpus_bytes // CHUNKS, SMALLEST_CHUNK), LARGEST_CHUNK)


def plan_chunks(files: Sequence[InputFile], chunk_bytes: int) -> list[Chunk]:
    """The pieces of ``files``, in order, in chunks of about ``chunk_bytes``.

    A piece belongs to the chunk in whose range of the corpus it begins; a chunk that no piece begins in is left
    out. So a chunk is smaller than two times ``chunk_bytes`` unless it ends with a larger file that cannot be cut.
    A pure function of the files.
    """
    pieces = _pieces(files, chunk_bytes)
    starts = accumulate((piece.bytes for piece in pieces), initial=0)
    placed = zip(pieces, starts, strict=False)  # the last start is the end of the corpus
    groups = groupby(placed, key=lambda item: item[1] // chunk_bytes)
    chunked = [tuple(piece for piece, _ in group) for _, group in groups]
    return [Chunk(number, group, sum(piece.bytes for piece in group)) for number, group in enumerate(chunked)]


def _pieces(files: Sequence[InputFile], piece_bytes: int) -> list[Piece]:
    # In their order, so that of several damaged files it is always the first that is named.
    opened = list(dict.fromkeys(file for file in files if file.kind == "parquet"))
    # Far away disks take their time for each footer, but not more for several at once.
    with ThreadPoolExecutor(_READERS) as pool:
        divided = dict(zip(opened, pool.map(divide, opened, repeat(piece_bytes)), strict=True))
    return list(chain.from_iterable(divided[file] if file in divided else divide(file, piece_bytes) for file in files))


def inputs_sha256(files: Sequence[InputFile]) -> str:
    """Identity of the input files: their names, sizes and times of modification, in order. Hexadecimal."""
    digest = sha256()
    for file in files:
        digest.update(f"{file.path}\0{file.bytes}\0{file.mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
