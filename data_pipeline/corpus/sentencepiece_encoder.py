"""SentencePiece models (Kudo and Richardson 2018) as encoders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...configs.errors import UsageError
from ..extras import missing_package

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


class SentencePieceEncoder:
    """A SentencePiece model. Control symbols in a text are encoded as the text they are."""

    splits_text = False
    """Its normalisation may add a space before a text, and so before each part of one."""

    def __init__(self, processor: SentencePieceProcessor) -> None:
        self._processor = processor
        self.vocabulary_size = int(processor.get_piece_size())
        self.end_of_document = int(processor.eos_id())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """See ``tokenizer.Encoder``. Uses one thread: preparation has processes for the others."""
        ids: list[list[int]] = self._processor.encode(texts, out_type=int, num_threads=1)
        return ids


def parse_sentencepiece(path: Path, data: bytes) -> SentencePieceEncoder:
    """The SentencePiece model of which ``data`` are the file; its end-of-sentence symbol ends documents.

    Raises UsageError, which names ``path``, when the data are no such model, when the model has no end-of-sentence
    control symbol, or when the package sentencepiece is missing.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise missing_package(f"tokenizer {path}", "sentencepiece", "sentencepiece") from error
    try:
        # The package takes no data at all for a model that is still to be loaded.
        if not data:
            raise ValueError("the file is empty")
        processor = SentencePieceProcessor(model_proto=data)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"{path} is not a SentencePiece model; give one, or a tokenizer.json") from error
    if processor.eos_id() < 0:
        raise UsageError(
            f"{path} has no end-of-sentence control symbol, which ends documents; train the model with --eos_id=2 and "
            "without </s> among user_defined_symbols, or give another tokenizer"
        )
    return SentencePieceEncoder(processor)
