"""The cursor: a run goes on where it was, and with other data only where that is asked for."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_folder import write_folder

from trine.configs.errors import UsageError
from trine.data_pipeline import mixture as mixture_module
from trine.data_pipeline.cursor import Cursor, Reading
from trine.data_pipeline.dataset import TokenDataset
from trine.data_pipeline.mixture import SampleId, Source
from trine.data_pipeline.order import SampleOrder

LENGTH = 4
WINDOWS = (61, 7, 23, 12)
READING = Reading(seed=3, sequence_length=LENGTH, shuffle="windows")

MakeCursor = Callable[..., Cursor]


@pytest.fixture(autouse=True)
def few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture_module, "SLOTS", 256)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenDataset]:
    made = {}
    for number, (name, windows) in enumerate(zip("abcd", WINDOWS, strict=True)):
        folder = tmp_path_factory.mktemp(name)
        write_folder(folder, {"train": [[windows * LENGTH + 1]]}, seed=number)
        made[name] = TokenDataset(folder, "train", LENGTH)
    return made


@pytest.fixture
def cursor(datasets: dict[str, TokenDataset]) -> MakeCursor:
    """A run's cursor over sources given as name=weight, in their order."""

    def make(reading: Reading = READING, **weights: float) -> Cursor:
        named = [(name, datasets[name], weight) for name, weight in weights.items()]
        return Cursor([Source(n, d, w, SampleOrder(len(d), reading.seed)) for n, d, w in named], reading)

    return make


def as_saved(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint makes of a state."""
    saved: dict[str, Any] = json.loads(json.dumps(state))
    assert saved == state
    return saved


def named(cursor: Cursor, ids: Sequence[SampleId]) -> list[tuple[str, int]]:
    return [(cursor.mixture.sources[sample.source].name, sample.window) for sample in ids]


def assert_gapless(read: Sequence[tuple[str, int]], datasets: dict[str, TokenDataset]) -> None:
    """Of each source: its first samples in its order, none twice and none left out."""
    for name, dataset in datasets.items():
        windows = [window for source, window in read if source == name]
        assert windows == SampleOrder(len(dataset), READING.seed).sample_ids(0, len(windows)).tolist()


def test_the_state_is_small_and_says_where_the_run_stands(cursor: MakeCursor) -> None:
    state = as_saved(cursor(a=3, b=1).state(100))
    identities = [source.pop("fingerprint") for source in state["sources"]]
    assert len(set(identities)) == 2
    assert re.fullmatch("[0-9a-f]{16}", state.pop("tokenizer"))
    assert state == {
        "format": 2,
        "consumed_samples": 100,
        "seed": 3,
        "sequence_length": 4,
        "shuffle": "windows",
        "mixed_since": 0,
        "sources": [
            {"name": "a", "weight": 3, "read": 75},
            {"name": "b", "weight": 1, "read": 25},
        ],
        "left": {},
    }


def test_eight_sources_of_a_long_run_fit_in_a_kilobyte(datasets: dict[str, TokenDataset]) -> None:
    sources = [Source(f"source-{n}", datasets["a"], 0.05 * (n + 1), SampleOrder(61, 0)) for n in range(8)]
    state = Cursor(sources, Reading(1234, 4096, "windows")).state(10**11)
    assert len(json.dumps(state | {"skipped_samples": 100})) < 1024


def test_the_same_mixture_reads_on_exactly(cursor: MakeCursor) -> None:
    whole = cursor(a=3, b=1, c=2)
    expected = whole.mixture.sample_ids(0, 900)
    for consumed in (0, 1, 255, 256, 257, 700):
        # What counts is the proportion of the weights.
        resumed = cursor(a=1.5, b=0.5, c=1)
        assert resumed.restore(as_saved(whole.state(consumed)), accept_changes=False) == []
        assert resumed.mixture.sample_ids(consumed, 900 - consumed) == expected[consumed:]
        assert resumed.state(900)["sources"][2]["read"] == whole.state(900)["sources"][2]["read"]


def test_a_checkpoint_of_a_checkpoint_reads_on_exactly(cursor: MakeCursor) -> None:
    state = cursor(a=3, b=1).state(100)
    changed = cursor(a=1, b=1)
    changed.restore(state, accept_changes=True)
    expected = changed.mixture.sample_ids(100, 500)
    state = changed.state(130)
    for position, following in [(130, 131), (131, 400), (400, 599), (599, 600)]:
        again = cursor(a=1, b=1)
        assert again.restore(as_saved(state), accept_changes=False) == []
        assert again.mixture.start == 100
        assert again.mixture.sample_ids(position, 600 - position) == expected[position - 100 :]
        state = again.state(following)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"reading": Reading(4, LENGTH, "windows"), "a": 3, "b": 1}, "train.seed was 3 and is 4"),
    ({"reading": Reading(3, 8, "windows"), "a": 3, "b": 1}, "train.sequence_length was 4 and is 8"),
    ({"reading": Reading(3, LENGTH, "blocks"), "a": 3, "b": 1}, "data.shuffle was windows and is blocks"),
    ({"a": 1, "b": 1}, "the weights were a 0.75, b 0.25 and are a 0.5, b 0.5"),
    ({"b": 1, "a": 3}, "the sources were in the order a, b"),
    ({"a": 3}, "b (fingerprint {b}) is gone"),
    ({"a": 3, "b": 1, "c": 1}, "c (fingerprint {c}) is new"),
    ({"a": 3, "d": 1}, "b (fingerprint {b}) is gone; d (fingerprint {d}) is new"),
    (
        {"reading": Reading(5, LENGTH, "blocks"), "a": 1, "b": 1},
        (
            "train.seed was 3 and is 5; data.shuffle was windows and is blocks; "
            "the weights were a 0.75, b 0.25 and are a 0.5, b 0.5"
        ),
    ),
]


@pytest.mark.parametrize(("now", "change"), CHANGES, ids=[change[:30] for _, change in CHANGES])
def test_every_change_is_refused_by_name_and_accepted_where_asked(
    cursor: MakeCursor, datasets: dict[str, TokenDataset], now: dict[str, Any], change: str
) -> None:
    state = as_saved(cursor(a=3, b=1).state(100))
    change = change.format(**{name: dataset.fingerprint[:16] for name, dataset in datasets.items()})
    changed = cursor(**now)
    refused = (
        f"the data of this run are not those of its checkpoint: {change}. Resume with what it had, begin a new run in "
        "another run.directory, or accept the change with data.on_change=accept"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(refused)}$"):
        changed.restore(state, accept_changes=False)
    assert "; ".join(changed.restore(state, accept_changes=True)) == change
    assert changed.mixture.start == 100
    assert len(changed.mixture.sample_ids(100, 50)) == 50
    # What was accepted is from then on the state of things.
    assert cursor(**now).restore(as_saved(changed.state(120)), accept_changes=False) == []


def test_sources_that_stay_read_on_when_others_come_and_go(
    cursor: MakeCursor, datasets: dict[str, TokenDataset]
) -> None:
    first = cursor(a=3, b=1)
    read = named(first, first.mixture.sample_ids(0, 130))
    second = cursor(d=2, c=1, a=1)
    second.restore(first.state(130), accept_changes=True)
    read += named(second, second.mixture.sample_ids(130, 200))
    assert_gapless(read, datasets)
    assert {name for name, _ in read[130:]} == {"a", "c", "d"}
    # And one that comes back goes on where it stood.
    third = cursor(b=1, c=1)
    third.restore(as_saved(second.state(330)), accept_changes=True)
    read += named(third, third.mixture.sample_ids(330, 100))
    assert_gapless(read, datasets)


def test_windows_of_another_length_begin_where_about_as_much_was_read(cursor: MakeCursor) -> None:
    state = cursor(a=3, b=1).state(100)
    longer = cursor(reading=Reading(3, 8, "windows"), a=3, b=1)
    longer.restore(state, accept_changes=True)
    assert longer.mixture.samples_read(100) == [37, 12]
    shorter = cursor(reading=Reading(3, 2, "windows"), a=3, b=1)
    shorter.restore(state, accept_changes=True)
    assert shorter.mixture.samples_read(100) == [150, 50]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), legs=st.integers(1, 8))
def test_no_history_of_changes_crashes_and_resumes_repeats_or_skips_a_sample(
    cursor: MakeCursor, datasets: dict[str, TokenDataset], seed: int, legs: int
) -> None:
    """Each leg begins from the last checkpoint with the same or other sources and weights, saves, and loses what it read
    after."""
    generator = random.Random(seed)
    weights = {"a": 3.0, "b": 1.0, "c": 1.0}
    run, read, consumed = cursor(**weights), [], 0
    state = run.state(0)
    for _ in range(legs):
        if generator.random() < 0.6:
            names = generator.sample("abc", generator.randrange(1, 4))
            weights = {name: generator.choice([0.1, 0.5, 1.0, 2.0, 7.0]) for name in names}
        run = cursor(**weights)
        run.restore(as_saved(state), accept_changes=True)
        length, lost = generator.randrange(400), generator.randrange(50)
        read += named(run, run.mixture.sample_ids(consumed, length + lost))[:length]
        consumed += length
        state = run.state(consumed)
        assert sum(source["read"] for source in state["sources"]) + sum(state["left"].values()) == consumed == len(read)
    assert_gapless(read, datasets)


def test_another_tokenizer_is_never_accepted(cursor: MakeCursor) -> None:
    run = cursor(a=3, b=1)
    state = run.state(100) | {"tokenizer": "0123456789abcdef"}
    complaint = (
        "trained on data of the tokenizer 0123456789abcdef and this run's data are of "
        f"{run.state(0)['tokenizer']}, whose token ids mean something else: prepare the data with the former"
    )
    for accepts in (False, True):
        with pytest.raises(UsageError, match=re.escape(complaint)):
            run.restore(state, accept_changes=accepts)


@pytest.mark.parametrize("accepts", [False, True])
def test_half_a_state_and_another_format_are_refused(cursor: MakeCursor, accepts: bool) -> None:
    run = cursor(a=3, b=1)
    state = run.state(100)
    for key in state.keys() - {"format"}:
        half = {name: value for name, value in state.items() if name != key}
        with pytest.raises(UsageError, match=f"lacks {key}: resume from a checkpoint that is whole"):
            run.restore(half, accept_changes=accepts)
    with pytest.raises(UsageError, match="lacks mixed_since and sources: "):
        run.restore({k: v for k, v in state.items() if k not in ("mixed_since", "sources")}, accept_changes=accepts)
    for other in (1, 3, None):
        with pytest.raises(UsageError, match=f"has format {other} and this version of trine reads format 2"):
            run.restore(state | {"format": other}, accept_changes=accepts)


def test_a_refused_state_leaves_the_run_as_it_was(cursor: MakeCursor) -> None:
    run = cursor(a=1, b=1)
    before = run.mixture.sample_ids(0, 50)
    with pytest.raises(UsageError):
        run.restore(cursor(a=3, b=1).state(100), accept_changes=False)
    assert run.mixture.sample_ids(0, 50) == before
