"""Verification: a folder of prepared data against its manifest, byte by byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import chain
from pathlib import Path

from ...configs.errors import RunError, UsageError
from ..corpus.tokenizer import load_encoder, tokenizer_sha256
from ..durable import TEMPORARY_SUFFIX
from ..preparation.claim import INPUTS, LOCK, OWNER
from ..preparation.fragments import FRAGMENTS
from .manifest import MANIFEST, UNFINISHED, Manifest, ShardRecord, dtype_name, load_manifest
from .member_index import index_name
from .problem import Problem
from .verification import ShardVerifier

Progress = Callable[[int, int], None]
"""Called with the bytes of shards that have been verified, and those of all shards."""


def verify(directory: Path, *, workers: int | None = None, progress: Progress | None = None) -> list[Problem]:
    """Everything that is wrong with a folder of prepared data: an empty list if runs can rely on it.

    Reads every byte of the folder: the manifest, the tokenizer, and each shard and index against the checksums of the
    manifest, the index and what a tar must look like. Files that the manifest does not name are warnings, for nothing
    reads them. ``workers`` threads (by default one per core) verify a shard each, and hold one of its members in
    memory each. ``progress`` is called from this thread.

    Raises UsageError for a folder that holds no finished preparation, or whose tokenizer needs a package that is
    missing.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"workers={workers} verify nothing; use 1 or more")
    try:
        manifest = load_manifest(directory)
    except RunError as error:
        return [Problem(MANIFEST, str(error))]
    return [
        *_manifest_problems(manifest),
        *_tokenizer_problems(directory, manifest),
        *_shard_problems(directory, manifest, workers or os.cpu_count() or 1, progress),
        *_strays(directory, manifest),
    ]


def _manifest_problems(manifest: Manifest) -> Iterator[Problem]:
    """Where the manifest contradicts itself."""
    size = manifest.vocabulary_size
    if manifest.eos_id >= size:
        yield Problem(MANIFEST, f"its end of document {manifest.eos_id} is beyond its vocabulary of {size}")
    if manifest.dtype != dtype_name(size):
        yield Problem(MANIFEST, f"its vocabulary of {size} is not stored as {manifest.dtype}")
    for split, records in manifest.splits.items():
        chunk, part = -1, 0
        for record in records:
            of_split, *place = record.name.removesuffix(".tar").split("-")
            next_chunk, next_part = map(int, place)
            follows = (next_chunk, next_part) == (chunk, part + 1) or (next_chunk > chunk and next_part == 0)
            if of_split != split or not follows:
                yield Problem(MANIFEST, f"{record.name} has no place where it stands in the split {split}")
            chunk, part = next_chunk, next_part


def _tokenizer_problems(directory: Path, manifest: Manifest) -> Iterator[Problem]:
    path = directory / manifest.tokenizer
    if not path.is_file():
        yield Problem(path.name, "it is missing")
        return
    found = tokenizer_sha256(path)
    is_right = found == manifest.tokenizer_sha256
    differs = f"its sha256 is {found} and the manifest says {manifest.tokenizer_sha256}"
    try:
        encoder = load_encoder(path)
    except UsageError:
        if is_right:
            raise  # the file is what it was: something that it needs is not installed
        yield Problem(path.name, f"it is damaged: {differs}")
        return
    if not is_right:
        yield Problem(path.name, f"it is not the tokenizer that made these tokens: {differs}")
        return
    facts = {"vocabulary_size": encoder.vocabulary_size, "eos_id": encoder.end_of_document}
    for field, value in facts.items():
        said = getattr(manifest, field)
        if said != value:
            yield Problem(MANIFEST, f"its {field} is {said}, and that of the tokenizer is {value}")


def _shard_problems(directory: Path, manifest: Manifest, workers: int, progress: Progress | None) -> list[Problem]:
    records = _records(manifest)
    total, done = sum(record.bytes for record in records), 0
    verifier = ShardVerifier(directory, manifest)
    # Hashing and reading release the interpreter's lock, so threads use the cores.
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(verifier.check, record): record for record in records}
        try:
            for future in as_completed(futures):
                done += futures[future].bytes
                if progress is not None:
                    progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return list(chain.from_iterable(future.result() for future in futures))


def _strays(directory: Path, manifest: Manifest) -> Iterator[Problem]:
    """Files that the manifest does not name."""
    records = _records(manifest)
    named = {MANIFEST, INPUTS, manifest.tokenizer, *(record.name for record in records)}
    named |= {index_name(record.name) for record in records}
    for name in sorted(os.listdir(directory)):
        if name in named:
            continue
        if name.endswith(TEMPORARY_SUFFIX) or name in (UNFINISHED, FRAGMENTS, LOCK, OWNER):
            yield Problem(name, "it was left by a preparation that was cut short, and may be deleted", is_warning=True)
        else:
            yield Problem(name, "the manifest does not name it, so nothing reads it", is_warning=True)


def _records(manifest: Manifest) -> Sequence[ShardRecord]:
    return [record for records in manifest.splits.values() for record in records]
