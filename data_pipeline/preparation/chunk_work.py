"""The work on one chunk: what a worker process does, from the pieces of the inputs to shards and their record."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from ...configs.errors import RunError
from ..corpus.documents import Document
from ..corpus.encoding import encode_documents
from ..corpus.sources import read_piece
from ..corpus.tokenizer import Encoder, parse_encoder, read_tokenizer
from ..shards.manifest import Request, dtype_name, token_dtype
from ..shards.writer import ShardWriter
from .chunks import Chunk
from .fragments import Fragment, is_whole, write_fragment
from .splits import SPLITS, TRAIN, Scores, holdout_score, split_of


@dataclass(frozen=True, slots=True)
class Job:
    """What the chunks of a preparation have in common."""

    output: Path
    request: Request
    tokenizer: Path
    tokenizer_sha256: str
    preparation: str
    """Identity that the records of its chunks carry."""


def prepare_chunk(job: Job, chunk: Chunk, earlier: Fragment | None) -> tuple[Fragment, bool]:
    """Write the shards of ``chunk`` and its record, which is returned with whether it was there.

    The shards of ``earlier``, a record of the same preparation, are kept if they are whole. Raises RunError when an
    input file or the tokenizer is not what it was when the preparation began, and what ``read_piece`` raises.
    """
    if earlier is not None and is_whole(job.output, earlier):
        return earlier, True
    encoder = _encoder(job.tokenizer, job.tokenizer_sha256)
    dtype = token_dtype(dtype_name(encoder.vocabulary_size))
    lowest_score, count = 1.0, 0
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(job.output, split, chunk.number, shard_tokens=job.request.shard_tokens)
            )
            for split in SPLITS
        }
        for document, ids in encode_documents(encoder, _documents(chunk, job.request.text_field), dtype):
            score = holdout_score(document.text)
            lowest_score = min(lowest_score, score)
            writers[split_of(score, job.request.validation_fraction)].add(ids)
            count += 1
        splits = {split: tuple(records) for split in SPLITS if (records := writers[split].finish())}
    _check_unchanged(chunk)
    tokens = sum(record.tokens for records in splits.values() for record in records)
    fragment = Fragment(
        preparation=job.preparation, chunk=chunk.number, splits=splits,
        documents=count, tokens=tokens, lowest_score=lowest_score,
    )  # fmt: skip
    write_fragment(job.output, fragment)
    return fragment, False


def score_chunk(chunk: Chunk, request: Request) -> Scores:
    """The scores of the documents of ``chunk``, by reading alone."""
    scores = [holdout_score(document.text) for document in _documents(chunk, request.text_field)]
    splits = frozenset(split_of(score, request.validation_fraction) for score in scores)
    return Scores(len(scores), min(scores, default=1.0), splits)


def sample_chunk(chunk: Chunk, request: Request, characters: int) -> list[str]:
    """The first documents of ``chunk`` that are trained on, ``characters`` in sum; the last one may be cut."""
    texts: list[str] = []
    for document in _documents(chunk, request.text_field):
        if split_of(holdout_score(document.text), request.validation_fraction) == TRAIN:
            texts.append(document.text[:characters])
            characters -= len(texts[-1])
            if not characters:
                break
    return texts


def _documents(chunk: Chunk, text_field: str) -> Iterator[Document]:
    for piece in chunk.pieces:
        yield from read_piece(piece, text_field)


def _check_unchanged(chunk: Chunk) -> None:
    """Raise RunError if a file was written to since the inputs were listed: the plan was made for another one."""
    for file in dict.fromkeys(piece.file for piece in chunk.pieces):
        found = os.stat(file.path)
        if (found.st_size, found.st_mtime_ns) != (file.bytes, file.mtime_ns):
            raise RunError(
                f"{file.path} has changed while it was prepared; delete the output folder and begin anew once the "
                "inputs no longer change"
            )


@lru_cache(maxsize=1)
def _encoder(tokenizer: Path, expected_sha256: str) -> Encoder:
    """The encoder, loaded once for all chunks that a process works on. Raises RunError when the file is another one."""
    data = read_tokenizer(tokenizer)
    found = sha256(data).hexdigest()
    # A network file system may show this process an earlier file of the name, and its tokens would be wrong ones.
    if found != expected_sha256:
        raise RunError(
            f"{tokenizer} has the SHA-256 {found} for this process and not {expected_sha256} as when the preparation "
            "began; leave the output folder to one preparation, and repeat its command"
        )
    return parse_encoder(tokenizer, data)
