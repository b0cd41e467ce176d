"""Which documents are held out: a pure function of a document's text."""

from __future__ import annotations

from hashlib import blake2b

TRAIN = "train"
VALIDATION = "validation"
SPLITS = (TRAIN, VALIDATION)


def holdout_score(text: str) -> float:
    """A number in [0, 1], uniform over texts; those below the validation fraction are held out.

    The text decides, and not its place in the corpus: exact copies of a document never lie on both sides, and
    documents keep their side when others are added, removed or read in another order.
    """
    digest = blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def split_of(score: float, validation_fraction: float) -> str:
    """The split of a document with that score: ``VALIDATION`` for about ``validation_fraction`` of all."""
    return VALIDATION if score < validation_fraction else TRAIN
