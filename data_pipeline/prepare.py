"""Preparation: documents become a folder with a tokenizer, token shards for each split, and a manifest."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..configs.errors import RunError, UsageError
from .durable import TEMPORARY_SUFFIX, write_durably
from .encoding import encode_documents
from .manifest import (
    MANIFEST,
    TOKENIZER,
    UNFINISHED,
    Manifest,
    Request,
    dtype_name,
    load_manifest,
    token_dtype,
    write_manifest,
)
from .member_index import INDEX_SUFFIX
from .shards import SHARD_TOKENS, ShardWriter
from .sources import Document, iter_documents, take_census
from .splits import SPLITS, TRAIN, VALIDATION, holdout_score, split_of
from .tokenizer import (
    check_vocabulary_size,
    end_of_document_id,
    load_tokenizer,
    sample_evenly,
    tokenizer_sha256,
    train_byte_level_bpe,
    vocabulary_size,
)

Progress = Callable[[str], None]

TRAINING_CHARACTERS = 16_000_000
"""Text that a tokenizer is trained on at most: beyond it, counts of pairs hardly change but the time does."""

_REPORT_SECONDS = 5.0
_OURS = re.compile(
    rf"({'|'.join(SPLITS)})-\d{{5,}}(\.tar|{re.escape(INDEX_SUFFIX)})({re.escape(TEMPORARY_SUFFIX)})?"
    rf"|({re.escape(TOKENIZER)}|{re.escape(MANIFEST)}){re.escape(TEMPORARY_SUFFIX)}|{re.escape(TOKENIZER)}"
)


def prepare(
    inputs: Sequence[str],
    output: Path,
    *,
    tokenizer: Path | None = None,
    train_tokenizer: int | None = None,
    validation_fraction: float = 0.02,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
) -> Manifest:
    """Prepare ``inputs`` (see ``sources``) for training in the folder ``output``.

    Either ``tokenizer`` names a ``tokenizer.json``, which is copied, or ``train_tokenizer`` is the size of
    the vocabulary to train on the documents. About ``validation_fraction`` of the documents are held out.
    ``progress`` is called with a sentence now and then.

    The result is a pure function of the request and the files. A finished preparation of the same request is
    returned at once; an unfinished one is begun anew. Raises UsageError for a request that cannot be met or
    an ``output`` that holds something else, RunError when the disk fails.
    """
    report = progress or _silent
    _check_arguments(tokenizer, train_tokenizer, validation_fraction, shard_tokens)
    # The encoder's own threads; set, because otherwise it warns and stops using them after the first fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        request = describe_request(
            inputs,
            tokenizer=tokenizer,
            train_tokenizer=train_tokenizer,
            validation_fraction=validation_fraction,
            shard_tokens=shard_tokens,
        )
        if is_prepared(output, request):
            report(f"{output} is prepared already")
            return load_manifest(output)
        # Read before the folder is emptied: it may be the one that an unfinished preparation left there.
        given = tokenizer.read_bytes() if tokenizer else None
        _claim(output, request)
        _provide_tokenizer(request, given, output / TOKENIZER, report)
        manifest = _write_shards(request, output, report)
        write_manifest(output, manifest)
        (output / UNFINISHED).unlink()
    except OSError as error:
        raise RunError(f"preparing {output} failed: {error}") from error
    return manifest


def describe_request(
    inputs: Sequence[str],
    *,
    tokenizer: Path | None,
    train_tokenizer: int | None,
    validation_fraction: float,
    shard_tokens: int,
) -> Request:
    """What the manifest of such a preparation records. Raises UsageError for an input that is not there."""
    census = take_census(inputs)
    return Request(
        sources=tuple(given.rstrip(os.sep) or given for given in inputs),
        source_files=census.files,
        source_bytes=census.bytes,
        tokenizer_sha256=tokenizer_sha256(tokenizer) if tokenizer else None,
        trained_vocabulary=train_tokenizer,
        validation_fraction=validation_fraction,
        shard_tokens=shard_tokens,
    )


def is_prepared(output: Path, request: Request) -> bool:
    """Whether ``output`` holds a finished preparation of ``request``.

    Raises UsageError when it holds a finished preparation of another one.
    """
    if not (output / MANIFEST).exists():
        return False
    difference = load_manifest(output).request.difference(request)
    if difference:
        raise UsageError(f"{output} holds another preparation ({difference}); choose another output folder")
    return True


def _silent(_: str) -> None:
    pass


def _check_arguments(
    tokenizer: Path | None, train_tokenizer: int | None, validation_fraction: float, shard_tokens: int
) -> None:
    if (tokenizer is None) == (train_tokenizer is None):
        raise UsageError("give either a tokenizer.json or the size of a vocabulary to train, one of the two")
    if train_tokenizer is not None:
        check_vocabulary_size(train_tokenizer)
    if tokenizer is not None:
        end_of_document_id(load_tokenizer(tokenizer))
    if not 0 <= validation_fraction < 1:
        raise UsageError(
            f"validation_fraction={validation_fraction} is not a fraction; choose 0 or more and less than 1"
        )
    if shard_tokens < 1:
        raise UsageError(f"shard_tokens={shard_tokens} leaves shards empty; choose 1 or more")


def _claim(output: Path, request: Request) -> None:
    """Make ``output`` ours and empty: what an unfinished preparation left there goes, all else is refused."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"output {output} is a file; name a new folder")
    output.mkdir(parents=True, exist_ok=True)
    others = {path.name for path in output.iterdir()} - {UNFINISHED + TEMPORARY_SUFFIX}
    if others and UNFINISHED not in others:
        raise UsageError(
            f"output {output} holds other files and no prepared data; choose a new or empty folder"
        )
    write_durably(output / UNFINISHED, (request.model_dump_json() + "\n").encode())
    for path in output.iterdir():
        if _OURS.fullmatch(path.name):
            path.unlink()


def _provide_tokenizer(request: Request, given: bytes | None, target: Path, report: Progress) -> None:
    if given is not None:
        write_durably(target, given)
    elif request.trained_vocabulary is not None:
        texts = _training_texts(request)
        report(
            f"training a vocabulary of {request.trained_vocabulary} tokens on "
            f"{sum(map(len, texts)) / 1e6:.1f} M characters of {len(texts)} documents"
        )
        trained = train_byte_level_bpe(texts, request.trained_vocabulary)
        write_durably(target, trained.to_str(pretty=True).encode("utf-8"))


def _training_texts(request: Request) -> list[str]:
    documents = (document.text for document in iter_documents(request.sources))
    fraction = request.validation_fraction
    texts = sample_evenly(
        (text for text in documents if split_of(holdout_score(text), fraction) == TRAIN), TRAINING_CHARACTERS
    )
    if not texts:
        raise UsageError(_nothing_to_train_on(fraction))
    return texts


def _write_shards(request: Request, output: Path, report: Progress) -> Manifest:
    tokenizer = load_tokenizer(output / TOKENIZER)
    size = vocabulary_size(tokenizer)
    dtype = token_dtype(dtype_name(size))
    documents = _counted(encode_documents(tokenizer, iter_documents(request.sources), dtype), report)
    lowest_score = 1.0
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(ShardWriter(output, split, shard_tokens=request.shard_tokens))
            for split in SPLITS
        }
        for document, tokens in documents:
            score = holdout_score(document.text)
            lowest_score = min(lowest_score, score)
            writers[split_of(score, request.validation_fraction)].add(tokens)
        splits = {split: tuple(records) for split in SPLITS if (records := writers[split].finish())}
    manifest = Manifest(
        dtype=dtype_name(size),
        vocabulary_size=size,
        eos_id=end_of_document_id(tokenizer),
        tokenizer_sha256=tokenizer_sha256(output / TOKENIZER),
        request=request,
        splits=splits,
    )
    _check_splits(manifest, lowest_score)
    return manifest


def _counted(
    documents: Iterator[tuple[Document, NDArray[np.unsignedinteger]]], report: Progress
) -> Iterator[tuple[Document, NDArray[np.unsignedinteger]]]:
    """Pass ``documents`` through and report how far they have come: every few seconds, and at the end."""
    count = tokens = 0
    last = time.monotonic()
    for document, ids in documents:
        yield document, ids
        count += 1
        tokens += ids.size
        if time.monotonic() - last >= _REPORT_SECONDS:
            report(f"tokenised {tokens / 1e6:.1f} M tokens of {count} documents so far")
            last = time.monotonic()
    report(f"tokenised {tokens / 1e6:.1f} M tokens of {count} documents")


def _check_splits(manifest: Manifest, lowest_score: float) -> None:
    fraction = manifest.request.validation_fraction
    held_out, documents = manifest.documents(VALIDATION), sum(map(manifest.documents, SPLITS))
    if documents == held_out:
        raise UsageError(_nothing_to_train_on(fraction))
    if fraction and not held_out:
        more = f"a fraction above {lowest_score:.4f}, " if documents > 1 else ""
        raise UsageError(
            f"validation_fraction={fraction} holds out no document of {documents}; "
            f"give more documents, {more}or 0 for no validation split"
        )


def _nothing_to_train_on(fraction: float) -> str:
    return (
        f"validation_fraction={fraction} holds out every document and leaves none to train on; "
        "give more documents, a smaller fraction, or 0 for no validation split"
    )
