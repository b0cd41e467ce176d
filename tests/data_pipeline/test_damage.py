"""Substitutes for damaged samples: a function of the sample alone, and no more than the budget."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from small_folder import write_folder

from trine.configs.errors import RunError
from trine.data_pipeline.damage import MOST_ATTEMPTS, Replacement, Substitutes
from trine.data_pipeline.dataset import TokenDataset
from trine.data_pipeline.mixture import Mixture, SampleId, Source
from trine.data_pipeline.order import SampleOrder

WINDOWS = 50
FOUND = {SampleId(0, 7): "one", SampleId(1, 7): "two", SampleId(1, 3): "three"}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder, {"train": [[WINDOWS * 4 + 1]]})
    dataset = TokenDataset(folder, "train", 4)
    return Mixture([Source(name, dataset, 1.0, SampleOrder(WINDOWS, 0)) for name in ("web", "books")])


def test_a_sample_is_replaced_by_the_first_draw_and_then_by_the_next(mixture: Mixture) -> None:
    substitutes, sample = Substitutes(mixture, 10), SampleId(1, 7)
    assert substitutes.table == {}
    for attempt in range(1, 5):
        instead = mixture.substitute(sample, attempt)
        assert substitutes.replace({sample: "it is cut"}) == [Replacement("books", 7, "it is cut", instead.window)]
        assert substitutes.table == {sample: instead}
        assert substitutes.count == 1


def test_the_table_is_the_same_in_whatever_order_damage_is_found(mixture: Mixture) -> None:
    tables, lines = [], []
    for order in itertools.permutations(FOUND):
        for cuts in ([1, 2], [2], [3], [1]):
            substitutes = Substitutes(mixture, 10)
            parts = [order[a:b] for a, b in itertools.pairwise([0, *cuts, 3])]
            found = [substitutes.replace({sample: FOUND[sample] for sample in part}) for part in parts if part]
            tables.append(dict(substitutes.table))
            lines.append(sorted(itertools.chain.from_iterable(found)))
    assert all(table == tables[0] for table in tables)
    assert all(line == lines[0] for line in lines)
    assert tables[0].keys() == FOUND.keys()


def test_lines_come_in_the_order_of_the_samples(mixture: Mixture) -> None:
    backwards = dict(reversed(FOUND.items()))
    lines = Substitutes(mixture, 10).replace(backwards)
    assert [(line.source, line.sample, line.reason) for line in lines] == [
        ("web", 7, "one"),
        ("books", 3, "three"),
        ("books", 7, "two"),
    ]


def test_the_budget_counts_samples_and_not_attempts(mixture: Mixture) -> None:
    substitutes = Substitutes(mixture, 2)
    for _ in range(5):
        substitutes.replace({SampleId(0, 1): "bad", SampleId(0, 2): "bad"})
    assert substitutes.count == 2
    complaint = (
        r"^3 damaged samples have been replaced, more than data\.damage_budget=2; the last one: shard x is cut\. "
        r"Repair the data \('trine data verify' lists the damage\), or raise the budget$"
    )
    with pytest.raises(RunError, match=complaint):
        substitutes.replace({SampleId(0, 3): "shard x is cut"})


def test_what_was_found_before_a_resume_counts(mixture: Mixture) -> None:
    substitutes = Substitutes(mixture, 5)
    substitutes.found_before = 4
    substitutes.replace({SampleId(0, 1): "bad"})
    assert substitutes.count == 5
    with pytest.raises(RunError, match="^6 damaged samples"):
        substitutes.replace({SampleId(0, 2): "bad"})


def test_a_source_without_a_whole_sample_ends_the_run(mixture: Mixture) -> None:
    substitutes = Substitutes(mixture, 10)
    for _ in range(MOST_ATTEMPTS):
        substitutes.replace({SampleId(1, 3): "bad"})
    complaint = (
        "^sample 3 of books is damaged and so are 100 others that were tried in its place; the last one: it is cut$"
    )
    with pytest.raises(RunError, match=complaint):
        substitutes.replace({SampleId(1, 3): "it is cut"})


def test_a_source_of_one_window_has_no_substitute(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": [[5]]})
    alone = Mixture([Source("tiny", TokenDataset(tmp_path, "train", 4), 1.0, SampleOrder(1, 0))])
    assert Substitutes(alone, 10).replace({SampleId(0, 0): "bad"}) == [Replacement("tiny", 0, "bad", 0)]
