"""From a configuration to its sources: those that do not fit together are refused before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_folder import write_folder

from trine.configs.errors import UsageError
from trine.configs.schema import Data, DataSource
from trine.data_pipeline.opening import read_prepared, source_names
from trine.data_pipeline.order import BlockOrder, SampleOrder
from trine.data_pipeline.shards.manifest import load_manifest, write_manifest

LENGTH = 4
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Prepare a folder of that name, with so many windows in its splits."""

    def folder(name: str, train: int = 9, validation: int = 5, seed: int = 0) -> str:
        lengths = {"train": [[train * LENGTH + 1]]}
        if validation:
            lengths["validation"] = [[validation * LENGTH + 1]]
        write_folder(tmp_path / name, lengths, seed=seed)
        return str(tmp_path / name)

    return folder


def mixed(*places: str, **keys: object) -> Data:
    sources = [{"directory": place, "weight": number + 1} for number, place in enumerate(places)]
    return Data.model_validate({"sources": sources, **keys})


def test_training_sources_are_shuffled_as_the_run_says(write: Write) -> None:
    data = mixed(write("web", train=9), write("books", train=6, seed=1))
    sources = read_prepared(data).training(LENGTH, 77)
    assert [(s.name, s.weight, len(s.dataset)) for s in sources] == [("web", 1.0, 9), ("books", 2.0, 6)]
    for source in sources:
        expected = SampleOrder(len(source.dataset), 77).sample_ids(0, 40).tolist()
        assert source.order.sample_ids(0, 40).tolist() == expected
    blocks = read_prepared(data.model_copy(update={"shuffle": "blocks"})).training(LENGTH, 77)
    assert all(isinstance(source.order, BlockOrder) for source in blocks)


def test_one_folder_is_a_mixture_of_one(write: Write) -> None:
    data = Data(directory=write("web"))
    assert [source.name for source in read_prepared(data).training(LENGTH, 0)] == ["web"]
    assert [source.order.sample_ids(3, 4).tolist() for source in read_prepared(data).validation(LENGTH)] == [[3, 4, 0, 1]]


def test_validation_reads_the_sources_that_have_some(write: Write) -> None:
    """The second has no such split, and that of the third is shorter than a window."""
    places = [write("a"), write("b", validation=0, seed=1), write("c", validation=1, seed=2), write("d", seed=3)]
    sources = read_prepared(mixed(*places)).validation(2 * LENGTH)
    assert [(s.name, s.weight, len(s.dataset)) for s in sources] == [("a", 1.0, 2), ("d", 4.0, 2)]
    assert sources[1].order.sample_ids(0, 5).tolist() == [0, 1, 0, 1, 0]


def test_a_run_without_any_validation_is_told_so(write: Write) -> None:
    alone = write("a", validation=0)
    with pytest.raises(UsageError, match=r"a has no split validation"):
        read_prepared(Data(directory=alone)).validation(LENGTH)
    complaint = (
        r"^no source has a validation split with a window of train\.sequence_length=4: prepare one with a larger "
        r"--validation-fraction, or set evaluation\.interval=0$"
    )
    with pytest.raises(UsageError, match=complaint):
        read_prepared(mixed(alone, write("b", validation=0, seed=1))).validation(LENGTH)


def test_a_source_too_short_for_training_is_refused(write: Write) -> None:
    with pytest.raises(UsageError, match=r"sequence_length=40 is too long for the split train of .*/b"):
        read_prepared(mixed(write("a", train=30), write("b", train=3, seed=1))).training(40, 0)


def test_manifests_come_in_the_order_of_the_sources(write: Write) -> None:
    manifests = read_prepared(mixed(write("a", train=3), write("b", train=5))).manifests
    assert [manifest.tokens("train") for manifest in manifests] == [13, 21]


def test_sources_of_another_tokenizer_are_refused(write: Write) -> None:
    one, other = write("a"), write("b")
    manifest = load_manifest(Path(other))
    write_manifest(Path(other), manifest.model_copy(update={"tokenizer_sha256": "0123456789ab" + "0" * 52}))
    ours = load_manifest(Path(one)).tokenizer_sha256[:12]
    complaint = (
        rf"^{other} was prepared with another tokenizer \(0123456789ab\) than {one} \({ours}\), so its token ids mean "
        rf"something else: prepare it again with --tokenizer {one}/tokenizer\.json$"
    )
    with pytest.raises(UsageError, match=complaint):
        read_prepared(mixed(one, other))


def test_the_same_data_under_two_names_are_refused(write: Write) -> None:
    one, copy = write("a"), write("copy")
    with pytest.raises(
        UsageError, match=f"^{copy} holds the same data as {one}: give them once, with the sum of the weights$"
    ):
        read_prepared(mixed(one, copy))
    # The same folder by two ways, which the configuration alone cannot tell.
    with pytest.raises(UsageError, match="holds the same data as"):
        read_prepared(mixed(one, f"{one}/../a"))


def test_a_source_that_is_not_there_is_named(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{tmp_path}/nowhere is not there"):
        read_prepared(mixed(write("a"), str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["data/web", "s3://bucket/books/", "https://host/deep/code"], ["web", "books", "code"]),
        (["x/web", "y/web", "books"], ["web-0", "web-1", "books-2"]),
        (["x/web", "y/web", "web-1"], ["web-0", "web-1", "web-1-2"]),
        (["/", "."], ["data-0", "data-1"]),
    ],
)
def test_names_tell_sources_apart(places: list[str], names: list[str]) -> None:
    assert source_names([DataSource(directory=place, weight=1.0) for place in places]) == names
