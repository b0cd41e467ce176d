"""Tokenizers: training byte-level BPE, and loading what was trained here or elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..configs.errors import UsageError
from .segments import segments

END_OF_DOCUMENT = "<|endoftext|>"
KNOWN_END_OF_DOCUMENT = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")
"""Names of the token that ends a document, in the order in which they are looked for."""

SMALLEST_VOCABULARY = 257
"""Every byte and the token that ends a document."""


def train_byte_level_bpe(documents: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Train byte-level BPE (Radford et al. 2019) whose id 0 is ``END_OF_DOCUMENT``.

    Deterministic: the same documents give the same tokenizer, whatever the number of threads. The vocabulary
    is smaller than ``vocabulary_size`` when the documents hold too few distinct pairs. Raises UsageError when
    ``vocabulary_size`` cannot hold every byte.
    """
    check_vocabulary_size(vocabulary_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for document in documents for piece in segments(document)), trainer)
    return tokenizer


def sample_evenly(documents: Iterable[str], characters: int) -> list[str]:
    """Documents from all along ``documents``, ``characters`` at most in sum; a single longer one is cut.

    Deterministic, and holds little more than it returns: every ``stride``-th document is kept, and when too
    much is held every other one goes and the stride doubles.
    """
    kept: list[str] = []
    held, stride = 0, 1
    for number, document in enumerate(documents):
        if number % stride:
            continue
        kept.append(document[:characters])
        held += len(kept[-1])
        while held > characters and len(kept) > 1:
            kept, stride = kept[::2], 2 * stride
            held = sum(map(len, kept))
    return kept


def check_vocabulary_size(size: int) -> None:
    """Raise UsageError unless byte-level BPE can have a vocabulary of ``size`` tokens."""
    if size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"a byte-level vocabulary of {size} tokens cannot hold every byte; "
            f"ask for {SMALLEST_VOCABULARY} at least"
        )


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a ``tokenizer.json``, without the truncation and padding that it may ask for.

    Raises UsageError when the file is missing or is not a tokenizer.
    """
    data = _read(path)
    try:
        tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise UsageError(
            f"{path} is not a tokenizer of the tokenizers package ({error}); give a tokenizer.json"
        ) from error
    # A tokenizer saved for inference may cut every text to its model's context.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_sha256(path: Path) -> str:
    """SHA-256 of the tokenizer's file, in hexadecimal. Raises UsageError when the file is missing."""
    return sha256(_read(path)).hexdigest()


def end_of_document_id(tokenizer: Tokenizer) -> int:
    """The id of the first of ``KNOWN_END_OF_DOCUMENT`` in the vocabulary. Raises UsageError when none is."""
    for name in KNOWN_END_OF_DOCUMENT:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return int(token)
    raise UsageError(
        f"the tokenizer has no token that ends a document; add one of {' '.join(KNOWN_END_OF_DOCUMENT)} to it"
    )


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id: ids of a vocabulary may have holes, and embeddings are indexed by id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"tokenizer {path} cannot be read ({error.strerror}); give a tokenizer.json"
        ) from error
