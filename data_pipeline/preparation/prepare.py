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
from ..corpus.sources import Listing, canonical, describe_skipped, is_utf8, list_files
from ..corpus.tokenizer import SENTENCEPIECE_SUFFIX, check_vocabulary_size, parse_encoder, read_tokenizer
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
from ..shards.member_index import index_name
from ..shards.writer import SHARD_TOKENS
from .chunk_work import Job, prepare_chunk, score_chunk
from .chunks import Chunk, default_chunk_bytes, inputs_sha256, plan_chunks
from .claim import (
    INPUTS,
    Claim,
    abandon,
    exclusively,
    has_inputs,
    note_inputs,
    note_tokenizer,
    release,
    remove_strays,
    take,
)
from .fan_out import completed
from .fragments import FRAGMENTS, Fragment, check_present, read_fragments
from .progress import Progress
from .splits import SPLITS, Scores, check_fraction, check_splits
from .tokenizer_training import train

_FORESEEN_BYTES = 64 << 20
"""Inputs up to this size are read once more beforehand, to see whether some document will be held out: in larger ones
the hash can be relied upon."""

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
    ``chunk_bytes`` of the inputs (by default ``default_chunk_bytes``). When it raises, the executor may still have
    tasks, which its shutdown with ``cancel_futures`` gives up.

    The result is a pure function of the other arguments and the files. A finished preparation of the same request
    and the same unchanged files is returned at once; an unfinished one is continued, its finished chunks being
    verified and kept.

    Raises:
        UsageError: the request cannot be met, an input cannot be read as what it should be, or ``output`` holds
            something else, was prepared from files that have changed, or is being prepared by another process.
        RunError: the disk fails, a process of ``executor`` has ended, or files change meanwhile. What was finished is
            kept.
    """
    progress = progress or Progress()
    _check_arguments(output, tokenizer, train_tokenizer, text_field, chunk_bytes, shard_tokens)
    check_fraction(validation_fraction)
    # Read once, and before the folder is claimed: it may be the one that an unfinished preparation left there.
    given = read_tokenizer(tokenizer) if tokenizer else None
    if tokenizer and given is not None:
        parse_encoder(tokenizer, given)
    # The encoder's own threads; set, because otherwise it warns and stops using them after the first fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        sources = tuple(map(canonical, inputs))
        listing = list_files(sources)
        request = Request(
            sources=sources,
            source_files=len(listing.files),
            source_bytes=listing.bytes,
            tokenizer_sha256=sha256(given).hexdigest() if given is not None else None,
            trained_vocabulary=train_tokenizer,
            text_field=text_field,
            validation_fraction=validation_fraction,
            chunk_bytes=chunk_bytes or default_chunk_bytes(listing.bytes),
            shard_tokens=shard_tokens,
        )
        digest = inputs_sha256(listing.files)
        if is_prepared(output, request, digest) and not (output / UNFINISHED).exists():
            progress.say(f"{output} is prepared already")
            return load_manifest(output)
        target = output / (_tokenizer_name(tokenizer) if tokenizer else TOKENIZER)
        with exclusively(output):
            if not is_prepared(output, request, digest):
                _complete(Claim(request=request, inputs_sha256=digest), listing, given, target, executor, progress)
            release(output)
        return load_manifest(output)
    except OSError as error:
        raise RunError(f"preparing {output} failed: {error}; {_CONTINUE}") from error
    except BrokenExecutor as error:
        raise RunError(
            "a worker process ended before its work was done, as happens when memory runs out; "
            f"{_CONTINUE}, and with fewer workers it needs less memory"
        ) from error


def is_prepared(output: Path, request: Request, inputs: str) -> bool:
    """Whether ``output`` holds a finished preparation of ``request`` from the input files of that identity.

    Raises UsageError when it holds a finished preparation of another request or of other files.
    """
    if not (output / MANIFEST).exists():
        return False
    difference = load_manifest(output).request.difference(request)
    if difference:
        raise UsageError(f"{output} holds another preparation ({difference}); choose another output folder")
    if not has_inputs(output, inputs):
        raise UsageError(
            f"{output} was prepared from other input files, or they have changed since ({INPUTS} there tells, by "
            "names, sizes and times of modification); choose another output folder, or delete this one to prepare anew"
        )
    return True


def _check_arguments(
    output: Path,
    tokenizer: Path | None,
    train_tokenizer: int | None,
    text_field: str,
    chunk_bytes: int | None,
    shard_tokens: int,
) -> None:
    if not is_utf8(str(output)):
        raise UsageError(f"output {str(output)!r} has a name that is not UTF-8, as configurations are; choose another")
    if (tokenizer is None) == (train_tokenizer is None):
        raise UsageError("give either a tokenizer or the size of a vocabulary to train, one of the two")
    if train_tokenizer is not None:
        check_vocabulary_size(train_tokenizer)
    if not is_utf8(text_field):
        raise UsageError(f"--text-field {text_field!r} is not UTF-8; name the field as the inputs do")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise UsageError(f"chunk_bytes={chunk_bytes} leaves chunks empty; choose 1 or more")
    if shard_tokens < 1:
        raise UsageError(f"shard_tokens={shard_tokens} leaves shards empty; choose 1 or more")


def _complete(
    claim: Claim,
    listing: Listing,
    given: bytes | None,
    tokenizer: Path,
    executor: Executor | None,
    progress: Progress,
) -> None:
    """Do what is not done yet in the folder of ``tokenizer``, which must be held, and write the manifest.

    ``given`` is what the tokenizer is to be; it is trained if there is none.
    """
    output, request = tokenizer.parent, claim.request
    claim = take(output, claim)
    if listing.skipped:
        progress.say(f"left out {describe_skipped(listing.skipped)}")
    chunks = plan_chunks(listing.files, request.chunk_bytes)
    progress.plan(len(listing.files), listing.bytes, len(chunks))
    if listing.bytes <= _FORESEEN_BYTES:
        tasks = [(chunk, request) for chunk in chunks]
        _check_splits(request, [scores for _, scores in completed(executor, score_chunk, tasks)], output)
    data = tokenizer.read_bytes() if tokenizer.exists() else b""
    if sha256(data).hexdigest() != claim.tokenizer_sha256:
        data = train(chunks, request, executor, progress) if given is None else given
        write_durably(tokenizer, data)
        note_tokenizer(output, claim, sha256(data).hexdigest())
    digest = sha256(data).hexdigest()
    identity = sha256(f"{request.model_dump_json()}\n{claim.inputs_sha256}\n{digest}".encode()).hexdigest()
    fragments = _prepare_chunks(Job(output, request, tokenizer, digest, identity), chunks, executor, progress)
    _check_splits(request, [fragment.scores for fragment in fragments], output)
    check_present(output, fragments)
    note_inputs(output, claim.inputs_sha256)
    write_manifest(output, _manifest(request, tokenizer, data, fragments))


def _check_splits(request: Request, chunks: Sequence[Scores], output: Path) -> None:
    """Raise UsageError unless every split asked for has documents."""
    try:
        check_splits(
            request.validation_fraction,
            documents=sum(scores.documents for scores in chunks),
            lowest_score=min((scores.lowest_score for scores in chunks), default=1.0),
            splits={split for scores in chunks for split in scores.splits},
        )
    except UsageError:
        # No repetition of this command can end otherwise, so nothing is lost; the corrected one finds a free folder.
        abandon(output)
        raise


def _prepare_chunks(job: Job, chunks: Sequence[Chunk], executor: Executor | None, progress: Progress) -> list[Fragment]:
    """The records of all chunks, in order, after those that are not done have been done."""
    earlier = read_fragments(job.output, job.preparation)
    shards = [record.name for fragment in earlier.values() for record in fragment.records()]
    remove_strays(job.output, {*shards, *map(index_name, shards)})
    (job.output / FRAGMENTS).mkdir(exist_ok=True)
    progress.begin(sum(chunk.bytes for chunk in chunks))
    tasks = [(job, chunk, earlier.get(chunk.number)) for chunk in chunks]
    done: dict[int, Fragment] = {}
    for number, (fragment, kept) in completed(executor, prepare_chunk, tasks):
        done[number] = fragment
        progress.advance(chunks[number].bytes, fragment.documents, fragment.tokens, kept=kept)
    progress.finish()
    return [done[number] for number in range(len(chunks))]


def _manifest(request: Request, tokenizer: Path, data: bytes, fragments: Sequence[Fragment]) -> Manifest:
    encoder = parse_encoder(tokenizer, data)
    records = {
        split: tuple(record for fragment in fragments for record in fragment.splits.get(split, ())) for split in SPLITS
    }
    return Manifest(
        dtype=dtype_name(encoder.vocabulary_size),
        vocabulary_size=encoder.vocabulary_size,
        eos_id=encoder.end_of_document,
        tokenizer=_tokenizer_name(tokenizer),
        tokenizer_sha256=sha256(data).hexdigest(),
        request=request,
        splits={split: shards for split, shards in records.items() if shards},
    )


def _tokenizer_name(path: Path) -> TokenizerName:
    return SENTENCEPIECE if path.suffix == SENTENCEPIECE_SUFFIX else TOKENIZER
