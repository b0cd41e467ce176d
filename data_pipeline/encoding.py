"""Documents to token ids, in batches of bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .segments import SEGMENT_CHARACTERS, segments
from .sources import Document
from .tokenizer import end_of_document_id

Segment = tuple[Document, str, bool]
"""A document, a piece of its text, and whether it is the last one."""


def encode_documents(
    tokenizer: Tokenizer, documents: Iterable[Document], dtype: np.dtype[np.unsignedinteger]
) -> Iterator[tuple[Document, NDArray[np.unsignedinteger]]]:
    """Each document with its token ids of ``dtype``, the last of which is the token that ends a document.

    The names of special tokens in a text are encoded as the text they are: only a document's end gives its
    token. The documents must not be empty. ``tokenizer`` is left in this mode.
    """
    end = np.array([end_of_document_id(tokenizer)], dtype)
    tokenizer.encode_special_tokens = True
    parts: list[NDArray[np.unsignedinteger]] = []
    for batch in _batches(documents):
        encodings = tokenizer.encode_batch_fast([text for _, text, _ in batch], add_special_tokens=False)
        for (document, _, is_last), encoding in zip(batch, encodings, strict=True):
            parts.append(np.array(encoding.ids, dtype))
            if is_last:
                yield document, np.concatenate([*parts, end])
                parts = []


def _batches(documents: Iterable[Document]) -> Iterator[list[Segment]]:
    batch: list[Segment] = []
    characters = 0
    for document in documents:
        pieces = segments(document.text)
        for number, piece in enumerate(pieces, start=1):
            batch.append((document, piece, number == len(pieces)))
            characters += len(piece)
            if characters >= SEGMENT_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch
