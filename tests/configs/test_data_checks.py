"""Data and ramps that do not fit together are refused in one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trine.configs.checks import check_config, check_layout
from trine.configs.data_checks import check_data, check_ramps
from trine.configs.errors import UsageError
from trine.configs.schema import Config, Data, Train

Load = Callable[..., Config]

WEB, BOOKS = {"directory": "data/web", "weight": 3}, {"directory": "s3://bucket/books", "weight": 1}

DATA_MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {},
        (
            "the data are either one folder (data.directory) or a mixture (data.sources), and neither is given: "
            "give one of them"
        ),
    ),
    (
        {"directory": "data/web", "sources": [WEB]},
        (
            "the data are either one folder (data.directory) or a mixture (data.sources), and both are given: "
            "give one of them"
        ),
    ),
    (
        {"directory": "pipe:cat x"},
        (
            "data.directory=pipe:cat x would run a command, and data are never read through one: "
            "give a folder, or an http(s):// or s3:// URL"
        ),
    ),
    (
        {"sources": [WEB, BOOKS | {"directory": "ftp://host/books"}]},
        (
            "data.sources.1.directory=ftp://host/books is no place that data are read from: give a folder (with ./ "
            "before a name that holds a colon), or an http://, https:// or s3:// URL"
        ),
    ),
    (
        {"sources": [WEB, BOOKS, WEB | {"directory": "data/web/"}]},
        (
            "data.sources.2.directory=data/web/ is the same as data.sources.0: "
            "give each source once, with the sum of the weights"
        ),
    ),
    (
        {"sources": [WEB, WEB | {"directory": "data/code"}], "cache": "cache"},
        "data.cache=cache keeps parts of remote data, and all data of this run are local: leave it out",
    ),
]

RAMP_MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"sequence_ramp": [{"until_samples": 5, "sequence_length": 24}]},
        (
            "train.sequence_ramp.0.sequence_length=24 does not divide train.sequence_length=128, whose windows are cut "
            "into sequences of that length: use a divisor of it"
        ),
    ),
    (
        {"sequence_ramp": [{"until_samples": 5, "sequence_length": 256}]},
        (
            "train.sequence_ramp.0.sequence_length=256 does not divide train.sequence_length=128, whose windows are cut "
            "into sequences of that length: use a divisor of it"
        ),
    ),
    (
        {"batch_ramp": [{"until_samples": n, "global_batch_size": 8} for n in (5, 9, 9)]},
        (
            "train.batch_ramp.2.until_samples=9 does not come after the 9 of the stage before it: "
            "put the stages in their order"
        ),
    ),
    (
        {"sequence_ramp": [{"until_samples": n, "sequence_length": 8} for n in (50, 40)]},
        (
            "train.sequence_ramp.1.until_samples=40 does not come after the 50 of the stage before it: "
            "put the stages in their order"
        ),
    ),
]


def exactly(sentence: str) -> str:
    return f"^{re.escape(sentence)}$"


def train(**keys: Any) -> Train:
    return Train.model_validate({"steps": 10, "global_batch_size": 64, "sequence_length": 128} | keys)


@pytest.mark.parametrize(("keys", "sentence"), DATA_MISTAKES, ids=[sentence[:40] for _, sentence in DATA_MISTAKES])
def test_data_that_cannot_be_read_are_refused(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=exactly(sentence)):
        check_data(Data.model_validate(keys))


def test_data_that_fit_are_accepted() -> None:
    check_data(Data(directory="data/web"))
    check_data(Data(directory="https://host/web", cache=Path("cache")))
    check_data(Data.model_validate({"sources": [WEB, BOOKS], "cache": "cache"}))
    check_data(Data.model_validate({"sources": [WEB]}))


@pytest.mark.parametrize(("keys", "sentence"), RAMP_MISTAKES, ids=[sentence[:50] for _, sentence in RAMP_MISTAKES])
def test_ramps_that_do_not_fit_are_refused(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=exactly(sentence)):
        check_ramps(train(**keys))


def test_ramps_that_fit_are_accepted() -> None:
    check_ramps(train())
    # The two ramps have boundaries of their own, and batches may shrink as well.
    check_ramps(
        train(
            batch_ramp=[{"until_samples": 50, "global_batch_size": 128}, {"until_samples": 60, "global_batch_size": 1}],
            sequence_ramp=[{"until_samples": 10, "sequence_length": 1}, {"until_samples": 55, "sequence_length": 128}],
        )
    )


def test_a_whole_configuration_is_checked_for_both(load: Load) -> None:
    with pytest.raises(UsageError, match="^data\\.directory=pipe:x would run a command"):
        check_config(load("data.directory=pipe:x"))
    with pytest.raises(UsageError, match="^train\\.sequence_ramp\\.0\\.sequence_length=5 does not divide"):
        check_config(load("train.sequence_ramp=[{until_samples: 5, sequence_length: 5}]"))


def test_every_batch_and_length_of_a_ramp_is_divided_over_the_ranks(load: Load) -> None:
    """The recipe has batches of 8 and sequences of 16."""
    ramp = "train.batch_ramp=[{until_samples: 8, global_batch_size: 4}, {until_samples: 20, global_batch_size: 6}]"
    assert check_layout(load(ramp), 2).num_microbatches == 4
    sentence = (
        "train.batch_ramp.1.global_batch_size=6 is not a multiple of train.micro_batch_size=1 x 4 data-parallel ranks "
        "= 4: use 4 or 8"
    )
    with pytest.raises(UsageError, match=exactly(sentence)):
        check_layout(load(ramp), 4)
    short = load("train.sequence_ramp=[{until_samples: 8, sequence_length: 2}]", "parallel.context=4")
    with pytest.raises(
        UsageError, match=r"^train\.sequence_ramp\.0\.sequence_length=2 cannot be divided over parallel\.context=4"
    ):
        check_layout(short, 4)
    with pytest.raises(
        UsageError, match=r"^train\.sequence_ramp\.0\.sequence_length=1 leaves no token to predict: use 2 or more$"
    ):
        check_config(load("train.sequence_ramp=[{until_samples: 8, sequence_length: 1}]"))
