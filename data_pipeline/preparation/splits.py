"""Which documents are held out: a pure function of a document's text."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import blake2b

from ...configs.errors import UsageError

TRAIN = "train"
VALIDATION = "validation"
SPLITS = (TRAIN, VALIDATION)

_FLAG = "--validation-fraction"


@dataclass(frozen=True, slots=True)
class Scores:
    """What decides whether each split will have documents."""

    documents: int
    lowest_score: float
    """The lowest ``holdout_score``, 1 without documents."""
    splits: frozenset[str]
    """Those that have documents."""


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


def check_fraction(validation_fraction: float) -> None:
    """Raise UsageError unless it is a fraction that leaves something to train on."""
    if not 0 <= validation_fraction < 1:
        raise UsageError(f"{_FLAG} {validation_fraction} is not a fraction: use 0 or more and less than 1")


def check_splits(validation_fraction: float, *, documents: int, lowest_score: float, splits: Collection[str]) -> None:
    """Raise UsageError, saying which fraction would do, unless there are documents in every split asked for.

    ``lowest_score`` is that of all ``documents``, and ``splits`` are those that have some.
    """
    if not documents:
        raise UsageError("the inputs hold no document, only empty files: give inputs with text")
    if TRAIN not in splits:
        raise UsageError(nothing_to_train_on(validation_fraction))
    if validation_fraction and VALIDATION not in splits:
        enough = math.floor(lowest_score * 1e4 + 1) / 1e4
        other = f"{_FLAG} {enough:.4f} to hold out the next one, " if documents > 1 and enough < 1 else ""
        raise UsageError(
            f"{_FLAG} {validation_fraction} holds out no document of {documents}: "
            f"use {other}{_FLAG} 0 for no validation split, or give more documents"
        )


def nothing_to_train_on(validation_fraction: float) -> str:
    """The sentence for a corpus without a document in the training split."""
    return (
        f"the inputs have no document to train on: they are empty, or {_FLAG} {validation_fraction} holds out every "
        f"one, and then use a smaller fraction, {_FLAG} 0 for no validation split, or give more documents"
    )
