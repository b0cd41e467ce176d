"""Tokenizers: training byte-level BPE, and encoding with what was trained here or elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Protocol
from unicodedata import normalize

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ...configs.errors import UsageError
from .segments import segments
from .sentencepiece_encoder import parse_sentencepiece

END_OF_DOCUMENT = "<|endoftext|>"
KNOWN_END_OF_DOCUMENT = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")
"""Names of the token that ends a document, in the order in which they are looked for."""

SMALLEST_VOCABULARY = 257
"""Every byte and the token that ends a document."""

SENTENCEPIECE_SUFFIX = ".model"

# Each is a place at which segments are cut: between a word's last character and the space before the next word.
_CUTS = (("word", " next"), ("9", " 9"), ("a_", " _b"), ("\u00e9t\u00e9", " l\u00e0"), ("\u4e2d", " \u6587"))
# Characters compose over no space, so these give the same text for the parts as for the whole.
_LOCAL_NORMALIZERS = (normalizers.NFC, normalizers.NFD, normalizers.NFKC, normalizers.NFKD)
_WORD_AND_SPACE = re.compile(r"\S\s")


class Encoder(Protocol):
    """A tokenizer of either kind: text to token ids, none of which is ``end_of_document``."""

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id."""

    @property
    def end_of_document(self) -> int:
        """The id that ends a document."""

    @property
    def splits_text(self) -> bool:
        """Whether the pieces into which ``segments`` cuts a text encode as the text does in one."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without any token added before or after."""


class TokenizersEncoder:
    """An encoder of the tokenizers package. It leaves ``tokenizer`` taking the names of special tokens for text.

    Raises UsageError when the tokenizer has no token that ends a document, or finds that token in texts.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.vocabulary_size = vocabulary_size(tokenizer)
        self.end_of_document = end_of_document_id(tokenizer)
        self.splits_text = _splits_text(tokenizer)
        self._check_end_of_document()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """See ``Encoder``. Uses as many threads as TOKENIZERS_PARALLELISM allows."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _check_end_of_document(self) -> None:
        # Unigram and word-level models take any entry of their vocabulary for a word, special or not.
        name = self._tokenizer.id_to_token(self.end_of_document)
        if self.end_of_document in self.encode_batch([f"a {name} a"])[0]:
            raise UsageError(
                f"the tokenizer takes {name} in a text for its token {self.end_of_document}, so that any text with it "
                "would end a document; give the SentencePiece model that it was made from, or another tokenizer"
            )


def load_encoder(path: Path) -> Encoder:
    """Load a SentencePiece model when the name ends in ``.model``, else a ``tokenizer.json``.

    Raises UsageError when the file is missing, is not what it is named or has no token that ends a document, or when
    the package sentencepiece is needed and missing.
    """
    return parse_encoder(path, read_tokenizer(path))


def parse_encoder(path: Path, data: bytes) -> Encoder:
    """The encoder of which ``data`` are the file; its name says which kind it is. Raises as ``load_encoder`` does."""
    if path.suffix == SENTENCEPIECE_SUFFIX:
        return parse_sentencepiece(path, data)
    return TokenizersEncoder(_parse(path, data))


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


def check_vocabulary_size(size: int) -> None:
    """Raise UsageError unless byte-level BPE can have a vocabulary of ``size`` tokens."""
    if size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"a byte-level vocabulary of {size} tokens cannot hold every byte; ask for {SMALLEST_VOCABULARY} at least"
        )


def _parse(path: Path, data: bytes) -> Tokenizer:
    """The tokenizer without the truncation, the padding and the BPE dropout that its file may ask for."""
    try:
        tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise UsageError(
            f"{path} is not a tokenizer of the tokenizers package ({error}); "
            f"give a tokenizer.json, or a SentencePiece model whose name ends in {SENTENCEPIECE_SUFFIX}"
        ) from error
    # A tokenizer saved for inference may cut every text to its model's context.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # One saved by a training with BPE dropout (Provilkov et al. 2020) would give the same text other tokens each time.
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None
    return tokenizer


def tokenizer_sha256(path: Path) -> str:
    """SHA-256 of the tokenizer's file, in hexadecimal. Raises UsageError when the file is missing."""
    return sha256(read_tokenizer(path)).hexdigest()


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


def _splits_text(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer itself cuts where ``segments`` does: its model then sees the same words either way."""
    if tokenizer.pre_tokenizer is None or not isinstance(tokenizer.normalizer, (type(None), *_LOCAL_NORMALIZERS)):
        return False
    # Added tokens are found before the tokenizer cuts; the special ones are not looked for at all.
    if any(_straddles(token) for token in tokenizer.get_added_tokens_decoder().values() if not token.special):
        return False

    def words(text: str) -> list[str]:
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    return all(words(before + after) == words(before) + words(after) for before, after in _CUTS)


def _straddles(token: AddedToken) -> bool:
    """Whether finding the token may depend on both sides of a cut: on a word's end and the space behind it."""
    content = normalize("NFKC", token.content)  # the widest of the normalizers
    return bool(token.rstrip or (token.single_word and content[:1].isspace()) or _WORD_AND_SPACE.search(content))


def read_tokenizer(path: Path) -> bytes:
    """The bytes of a tokenizer's file. Raises UsageError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"tokenizer {path} cannot be read ({error.strerror}); "
            f"give a tokenizer.json, or a SentencePiece model whose name ends in {SENTENCEPIECE_SUFFIX}"
        ) from error
