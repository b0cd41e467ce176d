"""Mixtures: each source has its share everywhere, and its own windows in its own order without a gap."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_folder import write_folder

from trine.configs.errors import UsageError
from trine.data_pipeline import mixture as mixture_module
from trine.data_pipeline.dataset import TokenDataset
from trine.data_pipeline.mixture import SLOTS, Mixture, SampleId, Shares, Source
from trine.data_pipeline.order import SampleOrder

LENGTH = 4
WINDOWS = (37, 5, 1)
SLOTS_IN_TESTS = 512

MakeSources = Callable[..., list[Source]]
in_few_slots = pytest.mark.usefixtures("few_slots")
WEIGHTS = st.lists(st.floats(0.02, 1.0), min_size=1, max_size=8)


@pytest.fixture
def few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture_module, "SLOTS", SLOTS_IN_TESTS)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[TokenDataset]:
    """Three sources of very different sizes: a run reads the smallest again and again."""
    folders = [tmp_path_factory.mktemp("source") for _ in WINDOWS]
    for number, (folder, windows) in enumerate(zip(folders, WINDOWS, strict=True)):
        write_folder(folder, {"train": [[windows * LENGTH + 1]]}, seed=number)
    return [TokenDataset(folder, "train", LENGTH) for folder in folders]


@pytest.fixture
def sources(datasets: list[TokenDataset]) -> MakeSources:
    """The first of them, with these weights."""

    def make(*weights: float) -> list[Source]:
        named = zip("abc", datasets, weights, strict=False)
        return [Source(name, one, weight, SampleOrder(len(one), 3)) for name, one, weight in named]

    return make


def deviations(weights: Sequence[float], slots: int) -> list[tuple[float, float]]:
    """For each source the least and the greatest surplus over its share, among the first n samples for all n."""
    shares = Shares(weights)
    source, _ = shares.places(0, 2 * slots)
    found = []
    for number, count in enumerate(shares.slots):
        surplus = np.cumsum(source == number) - count / slots * np.arange(1, 2 * slots + 1)
        found.append((min(surplus.min(), 0.0), max(surplus.max(), 0.0)))
    return found


@in_few_slots
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weights=WEIGHTS)
def test_each_source_has_its_share_of_any_samples_in_a_row(weights: list[float]) -> None:
    """A window's surplus is the difference of two prefixes': their spread bounds that of all windows."""
    shares = Shares(weights)
    assert sum(shares.slots) == SLOTS_IN_TESTS
    assert shares.counts(SLOTS_IN_TESTS) == shares.slots
    for weight, count in zip(weights, shares.slots, strict=True):
        assert abs(count - weight / sum(weights) * SLOTS_IN_TESTS) < 1
    for least, greatest in deviations(weights, SLOTS_IN_TESTS):
        assert least > -1
        assert greatest < 1
        assert greatest - least < 2


@pytest.mark.parametrize(
    "weights", [[0.7, 0.3], [5, 3, 2, 1, 1, 1, 0.5, 0.01], [0.5, *[1 / 600] * 300], [1 - 2 / SLOTS, 2 / SLOTS]]
)
def test_many_small_sources_do_not_come_in_a_bunch(weights: list[float]) -> None:
    assert all(least > -1 and greatest < 1 for least, greatest in deviations(weights, SLOTS))


@in_few_slots
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weights=WEIGHTS, start=st.integers(0, 2000), count=st.integers(0, 700))
def test_places_are_counted_without_a_gap_from_anywhere(weights: list[float], start: int, count: int) -> None:
    shares = Shares(weights)
    source, place = shares.places(start, count)
    before, after = shares.counts(start), shares.counts(start + count)
    assert sum(before) == start
    assert sum(after) == start + count
    for number in range(len(weights)):
        assert place[source == number].tolist() == list(range(before[number], after[number]))


def test_only_proportions_count() -> None:
    assert Shares([3, 1]).slots == Shares([0.75, 0.25]).slots == [49152, 16384]
    assert Shares([1e308, 1e308]).slots == [32768, 32768]
    assert Shares([1, 1, 1]).slots == [21846, 21845, 21845]
    assert Shares([5e-324]).slots == [SLOTS]


def test_a_weight_too_small_to_be_read_is_refused() -> None:
    complaint = (
        r"data\.sources\.1\.weight=1e-06 is less than 1/65536 of all weights, so the source would never be read: "
        "raise it, or leave the source out"
    )
    with pytest.raises(UsageError, match=complaint):
        Shares([1.0, 1e-6])
    assert Shares([1.0, 1.6e-5]).slots == [SLOTS - 1, 1]


def test_pinned_pattern() -> None:
    # A run resumes in another version only if these never change.
    assert Shares([5, 3, 2]).places(0, 12)[0].tolist() == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1]
    assert Shares([0.7, 0.2, 0.1]).places(SLOTS - 6, 12)[0].tolist() == [0, 0, 1, 0, 0, 2, 0, 0, 0, 1, 0, 0]


@in_few_slots
def test_each_source_is_read_in_its_own_order_over_epochs(sources: MakeSources) -> None:
    mixture = Mixture(sources(0.6, 0.3, 0.1))
    read = mixture.sample_ids(0, 1000)
    for number, source in enumerate(mixture.sources):
        windows = [sample.window for sample in read if sample.source == number]
        assert windows == source.order.sample_ids(0, len(windows)).tolist()
        assert len(windows) > 2 * len(source.dataset)
    assert mixture.samples_read(1000) == [sum(s.source == n for s in read) for n in range(3)]


@in_few_slots
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, 1200), count=st.integers(0, 200))
def test_entered_anywhere_it_is_the_same_sequence(sources: MakeSources, start: int, count: int) -> None:
    mixture = Mixture(sources(1, 2))
    assert mixture.sample_ids(start, count) == mixture.sample_ids(0, start + count)[start:]


@in_few_slots
def test_one_source_is_its_order(sources: MakeSources) -> None:
    (source,) = sources(17.5)
    read = Mixture([source]).sample_ids(600, 90)
    assert read == [SampleId(0, window) for window in source.order.sample_ids(600, 90).tolist()]


@in_few_slots
def test_a_mixture_that_takes_over_reads_on(sources: MakeSources) -> None:
    """At sample 777 the weights change; the third source, which is new, begins with its first."""
    first = Mixture(sources(1, 3))
    then = Mixture(sources(2, 1, 1), 777, [*first.samples_read(777), 0])
    read = first.sample_ids(0, 777) + then.sample_ids(777, 400)
    for number, source in enumerate(then.sources):
        windows = [sample.window for sample in read if sample.source == number]
        assert windows == source.order.sample_ids(0, len(windows)).tolist()
    assert then.samples_read(777) == [*first.samples_read(777), 0]
    assert then.samples_read(1177) == [sum(s.source == n for s in read) for n in range(3)]
    assert [sum(s.source == n for s in read[777:]) for n in range(3)] == [200, 100, 100]


def test_a_sample_is_a_window_of_its_source(sources: MakeSources, datasets: list[TokenDataset]) -> None:
    mixture = Mixture(sources(1, 1))
    for number, dataset in enumerate(datasets[:2]):
        tokens = np.empty(dataset.sequence_length + 1, np.int64)
        starts = mixture.read_into(tokens, SampleId(number, 4), documents=True)
        np.testing.assert_array_equal(tokens, dataset[4].tokens)
        np.testing.assert_array_equal(starts, dataset[4].document_starts)
        assert mixture.read_into(tokens, SampleId(number, 3), documents=False).size == 0
        np.testing.assert_array_equal(tokens, dataset[3].tokens)


def test_substitutes_are_drawn_from_the_whole_source(sources: MakeSources) -> None:
    mixture, again = Mixture(sources(1, 1)), Mixture(sources(3, 1, 1), start=50)
    for sample in (SampleId(0, 0), SampleId(0, 36), SampleId(1, 2)):
        drawn = [mixture.substitute(sample, attempt) for attempt in range(1, 200)]
        assert drawn == [again.substitute(sample, attempt) for attempt in range(1, 200)]
        assert {one.source for one in drawn} == {sample.source}
        # 199 draws from 37 miss a window with a probability of 0.5 %, and these are fixed ones that miss none.
        assert {one.window for one in drawn} == set(range(WINDOWS[sample.source]))
    # Neighbours are not replaced by neighbours.
    windows = np.array([mixture.substitute(SampleId(0, window), 1).window for window in range(37)])
    assert sorted(windows.tolist()) == list(range(37))
    assert (np.diff(windows) == 1).sum() < 5
