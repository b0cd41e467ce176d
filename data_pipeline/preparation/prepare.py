"""Preparation: inputs become a folder with a tokenizer, token shards for each split, and a manifest.

The inputs are cut into chunks. Each is worked on by itself, in any process, and leaves a record when it is done;
what a kill interrupts is continued by the same call. The folder's bytes depend on the inputs and the request alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, Executor
from hashlib import sha256
from pathlib import Path

from ...configs.errors import RunError, UsageError
from ..corpus.sources import Listing, describe_skipped, list_files
from ..corpus.tokenizer import SENTENCEPIECE_SUFFIX, check_vocabulary_size, load_encoder, tokenizer_sha256
from ..durable import write_durably
from ..shards.manifest import (
    MANIFEST,
    SENTENCEPIECE,
    TOKENIZER,
    UNFINISHED,
    Manifest,
    Request,
    TokenizerName,
    dtype_name,
    load_manifest,
    write_manifest,
)
from ..shards.member_index import INDEX_SUFFIX
from ..shards.writer import SHARD_TOKENS
from .chunk_work import Job, prepare_chunk
from .chunks import Chunk, default_chunk_bytes, inputs_sha256, plan_chunks
from .claim import Claim, abandon, exclusively, note_tokenizer, release, remove_strays, take
from .fan_out import completed
from .fragments import FRAGMENTS, Fragment, read_fragments
from .progress import Progress
from .splits import SPLITS, check_fraction, check_splits
from .tokenizer_training import train

_CONTINUE = "what is finished is kept, and the same command continues"


def prepare(
    inputs: Sequence[str],
    output: Path,
    *,
    tokenizer: Path | None = None,
    train_tokenizer: int | None = None,
    text_field: str = "text",
    validation_fraction: float = 0.02,
    chunk_bytes: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Prepare ``inputs`` (see ``sources``) for training in the folder ``output``.

    Either ``tokenizer`` names a ``tokenizer.json`` or a SentencePiece model, which is copied, or ``train_tokenizer``
    is the size of the vocabulary to train on the documents. About ``validation_fraction`` of the documents are held
    out. The work is done by the processes of ``executor`` or, by default, in this one, in chunks of about
    ``chunk_bytes`` of the inputs (by default ``default_chunk_bytes``).

    The result is a pure function of the other arguments and the files. A finished preparation of the same request
    is returned at once; an unfinished one is continued, its finished chunks being verified and kept.

    Raises:
        UsageError: the request cannot be met, an input cannot be read as what it should be, or ``output`` holds
            something else or is being prepared by another process.
        RunError: the disk fails, or a process of ``executor`` has ended. What was finished is kept.
    """
    progress = progress or Progress()
    _check_arguments(tokenizer, train_tokenizer, chunk_bytes, shard_tokens)
    check_fraction(validation_fraction)
    # The encoder's own threads; set, because otherwise it warns and stops using them after the first fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        listing = list_files(inputs)
        request = Request(
            sources=tuple(given.rstrip(os.sep) or given for given in inputs),
            source_files=len(listing.files),
            source_bytes=listing.bytes,
            tokenizer_sha256=tokenizer_sha256(tokenizer) if tokenizer else None,
            trained_vocabulary=train_tokenizer,
            text_field=text_field,
            validation_fraction=validation_fraction,
            chunk_bytes=chunk_bytes or default_chunk_bytes(listing.bytes),
            shard_tokens=shard_tokens,
        )
        if is_prepared(output, request) and not (output / UNFINISHED).exists():
            progress.say(f"{output} is prepared already")
            return load_manifest(output)
        # Read before the folder is claimed: it may be the one that an unfinished preparation left there.
        given = tokenizer.read_bytes() if tokenizer else None
        target = output / (_tokenizer_name(tokenizer) if tokenizer else TOKENIZER)
        with exclusively(output):
            if not is_prepared(output, request):
                _complete(request, listing, given, target, executor, progress)
            release(output)
        return load_manifest(output)
    except OSError as error:
        raise RunError(f"preparing {output} failed: {error}; {_CONTINUE}") from error
    except BrokenExecutor as error:
        raise RunError(
            "a worker process ended before its work was done, as happens when memory runs out; "
            f"{_CONTINUE}, and with fewer workers it needs less memory"
        ) from error


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


def _check_arguments(
    tokenizer: Path | None, train_tokenizer: int | None, chunk_bytes: int | None, shard_tokens: int
) -> None:
    if (tokenizer is None) == (train_tokenizer is None):
        raise UsageError("give either a tokenizer or the size of a vocabulary to train, one of the two")
    if train_tokenizer is not None:
        check_vocabulary_size(train_tokenizer)
    if tokenizer is not None:
        load_encoder(tokenizer)
    if chunk_bytes is not None and chunk_bytes < 1:
        raise UsageError(f"chunk_bytes={chunk_bytes} leaves chunks empty; choose 1 or more")
    if shard_tokens < 1:
        raise UsageError(f"shard_tokens={shard_tokens} leaves shards empty; choose 1 or more")


def _complete(
    request: Request,
    listing: Listing,
    given: bytes | None,
    tokenizer: Path,
    executor: Executor | None,
    progress: Progress,
) -> None:
    """Do what is not done yet in the folder of ``tokenizer``, which must be held, and write the manifest.

    ``given`` is what the tokenizer is to be; it is trained if there is none.
    """
    output = tokenizer.parent
    inputs = inputs_sha256(listing.files)
    claim = take(output, Claim(request=request, inputs_sha256=inputs))
    if listing.skipped:
        progress.say(f"left out {describe_skipped(listing.skipped)}: files of other kinds")
    chunks = plan_chunks(listing.files, request.chunk_bytes)
    if not tokenizer.exists() or tokenizer_sha256(tokenizer) != claim.tokenizer_sha256:
        if given is None:
            given = train(chunks, request, executor, progress)
        write_durably(tokenizer, given)
        note_tokenizer(output, claim, tokenizer_sha256(tokenizer))
    digest = tokenizer_sha256(tokenizer)
    identity = sha256(f"{request.model_dump_json()}\n{inputs}\n{digest}".encode()).hexdigest()
    fragments = _prepare_chunks(Job(output, request, tokenizer, digest, identity), chunks, executor, progress)
    _check_splits(request, fragments, output)
    write_manifest(output, _manifest(request, tokenizer, fragments))


def _check_splits(request: Request, fragments: Sequence[Fragment], output: Path) -> None:
    """Raise UsageError unless every split asked for has documents."""
    try:
        check_splits(
            request.validation_fraction,
            documents=sum(fragment.documents for fragment in fragments),
            lowest_score=min((fragment.lowest_score for fragment in fragments), default=1.0),
            splits={split for fragment in fragments for split in fragment.splits},
        )
    except UsageError:
        # No repetition of this command can end otherwise, so nothing is lost; the corrected one finds a free folder.
        abandon(output)
        raise


def _prepare_chunks(job: Job, chunks: Sequence[Chunk], executor: Executor | None, progress: Progress) -> list[Fragment]:
    """The records of all chunks, in order, after those that are not done have been done."""
    earlier = read_fragments(job.output, job.preparation)
    shards = [record.name for fragment in earlier.values() for record in fragment.records()]
    remove_strays(job.output, {*shards, *(str(Path(name).with_suffix(INDEX_SUFFIX)) for name in shards)})
    (job.output / FRAGMENTS).mkdir(exist_ok=True)
    progress.begin(sum(chunk.bytes for chunk in chunks))
    tasks = [(job, chunk, earlier.get(chunk.number)) for chunk in chunks]
    done: dict[int, Fragment] = {}
    for number, (fragment, kept) in completed(executor, prepare_chunk, tasks):
        done[number] = fragment
        progress.advance(chunks[number].bytes, fragment.documents, fragment.tokens, kept=kept)
    progress.finish()
    return [done[number] for number in range(len(chunks))]


def _manifest(request: Request, tokenizer: Path, fragments: Sequence[Fragment]) -> Manifest:
    encoder = load_encoder(tokenizer)
    records = {
        split: tuple(record for fragment in fragments for record in fragment.splits.get(split, ())) for split in SPLITS
    }
    return Manifest(
        dtype=dtype_name(encoder.vocabulary_size),
        vocabulary_size=encoder.vocabulary_size,
        eos_id=encoder.end_of_document,
        tokenizer=_tokenizer_name(tokenizer),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        request=request,
        splits={split: shards for split, shards in records.items() if shards},
    )


def _tokenizer_name(path: Path) -> TokenizerName:
    return SENTENCEPIECE if path.suffix == SENTENCEPIECE_SUFFIX else TOKENIZER
