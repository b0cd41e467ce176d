"""Documents to token ids, in batches of bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from .documents import Document
from .segments import SEGMENT_CHARACTERS, segments
from .tokenizer import Encoder

Segment = tuple[Document, str, bool]
"""A document, a piece of its text, and whether it is the last one."""


def encode_documents(
    encoder: Encoder, documents: Iterable[Document], dtype: np.dtype[np.unsignedinteger]
) -> Iterator[tuple[Document, NDArray[np.unsignedinteger]]]:
    """Each document with its token ids of ``dtype``, the last of which is the token that ends a document.

    The names of special tokens in a text are encoded as the text they are: only a document's end gives its
    token. The documents must not be empty.
    """
    # Arrays, because a list of Python's integers is many times as large.
    ids: list[NDArray[np.unsignedinteger]] = []
    for batch in _batches(documents, cut=encoder.splits_text):
        encodings = encoder.encode_batch([text for _, text, _ in batch])
        for (document, _, is_last), encoding in zip(batch, encodings, strict=True):
            ids.append(np.fromiter(encoding, dtype, len(encoding)))
            if is_last:
                ids.append(np.full(1, encoder.end_of_document, dtype))
                yield document, np.concatenate(ids)
                ids.clear()


def _batches(documents: Iterable[Document], *, cut: bool) -> Iterator[list[Segment]]:
    batch: list[Segment] = []
    characters = 0
    for document in documents:
        pieces = segments(document.text) if cut else [document.text]
        for number, piece in enumerate(pieces, start=1):
            batch.append((document, piece, number == len(pieces)))
            characters += len(piece)
            if characters >= SEGMENT_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch
