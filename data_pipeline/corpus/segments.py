"""Long texts in pieces that keep their tokens, so that encoding needs bounded memory."""

from __future__ import annotations

import re

SEGMENT_CHARACTERS = 1 << 20
"""Characters encoded at once: the tokenizers package needs about 130 bytes for each while it holds them."""

# Most pre-tokenizers cut between a word and the space before the next one.
_BETWEEN_WORDS = re.compile(r"(?<=\w)(?= \w)")


def segments(text: str) -> list[str]:
    """``text`` in pieces of SEGMENT_CHARACTERS or a little more.

    They encode as the text does in one when the tokenizer itself cuts there: see ``tokenizer.Encoder.splits_text``.
    A text without a space between two words has no place for a cut and stays whole.
    """
    pieces: list[str] = []
    start = 0
    while start < len(text):
        cut = _BETWEEN_WORDS.search(text, start + SEGMENT_CHARACTERS)
        end = cut.start() if cut else len(text)
        pieces.append(text[start:end])
        start = end
    return pieces
