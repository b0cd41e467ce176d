"""The tokenizer that a preparation trains: on which of its documents, read in a bounded time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

from ...configs.errors import UsageError
from ..corpus.tokenizer import train_byte_level_bpe
from ..shards.manifest import Request
from .chunk_work import sample_chunk
from .chunks import Chunk
from .fan_out import completed
from .progress import Progress
from .splits import nothing_to_train_on

TRAINING_CHARACTERS = 16_000_000
"""Text that a tokenizer is trained on at most: beyond it, counts of pairs hardly change but the time does."""
TRAINING_CHUNKS = 64
"""Chunks from whose beginnings that text is taken at most: they are read before any other work is done."""


def train(chunks: Sequence[Chunk], request: Request, executor: Executor | None, progress: Progress) -> bytes:
    """The ``tokenizer.json`` that ``request`` asks for, trained on documents of ``chunks`` that are not held out.

    Raises UsageError when there are none, ValueError when the request does not ask for one.
    """
    vocabulary = request.trained_vocabulary
    if vocabulary is None:
        raise ValueError("the request names a tokenizer and none is to be trained")
    texts = _training_texts(chunks, request, executor)
    progress.say(
        f"training a vocabulary of {vocabulary} tokens on {sum(map(len, texts)) / 1e6:.1f} M characters "
        f"of {len(texts)} documents"
    )
    return train_byte_level_bpe(texts, vocabulary).to_str(pretty=True).encode("utf-8")


def _training_texts(chunks: Sequence[Chunk], request: Request, executor: Executor | None) -> list[str]:
    """Documents from the beginnings of chunks all along the corpus; all documents when it is small.

    The characters are shared out among the chunks by their bytes. A corpus with no more bytes than the limit is
    therefore taken whole, unless it is compressed: there chunks may hold more characters than bytes.
    """
    count = min(len(chunks), TRAINING_CHUNKS)
    chosen = [chunks[number * len(chunks) // count] for number in range(count)]
    total = max(1, sum(chunk.bytes for chunk in chosen))
    shares = [TRAINING_CHARACTERS * chunk.bytes // total for chunk in chosen]
    tasks = [(chunk, request, share) for chunk, share in zip(chosen, shares, strict=True) if share]
    samples = dict(completed(executor, sample_chunk, tasks))
    texts = [text for number in range(len(tasks)) for text in samples[number]]
    if not texts:
        raise UsageError(nothing_to_train_on(request.validation_fraction))
    return texts
