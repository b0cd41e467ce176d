"""Windows over shards: the plain concatenation of the documents, and no silent damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trine.configs.errors import RunError, UsageError
from trine.data_pipeline import dataset as dataset_module
from trine.data_pipeline.dataset import Sample, TokenDataset
from trine.data_pipeline.manifest import load_manifest
from trine.data_pipeline.member_index import Member, parse_index

WriteSplit = Callable[..., Path]
DOCUMENTS = [[1, 2, 0], [3] * 24 + [0], [0], [4, 0], [5] * 9 + [0], [6, 7, 0]]


def index_of(shard: Path) -> list[Member]:
    return [Member(*row.tolist()) for row in parse_index(shard.with_suffix(".idx.npy").read_bytes())]


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared corpus that a test may damage."""
    return shutil.copytree(prepared, tmp_path / "copy")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=20),
    sequence_length=st.integers(1, 30),
    member_tokens=st.integers(1, 20),
    shard_tokens=st.integers(20, 200),
)
def test_windows_and_documents_against_the_plain_concatenation(
    write_split: WriteSplit, lengths: list[int], sequence_length: int, member_tokens: int, shard_tokens: int
) -> None:
    documents = [[n + 1] * (length - 1) + [0] for n, length in enumerate(lengths)]
    folder = write_split(documents, member_tokens=member_tokens, shard_tokens=shard_tokens)
    stream = [token for document in documents for token in document]
    starts = set(np.cumsum([0, *lengths[:-1]]).tolist())
    if len(stream) <= sequence_length:
        return
    dataset = TokenDataset(folder, "train", sequence_length)
    assert len(dataset) == (len(stream) - 1) // sequence_length
    for g in range(len(dataset)):
        first = g * sequence_length
        sample = dataset[g]
        assert sample.tokens.dtype == np.int64
        assert sample.tokens.tolist() == stream[first : first + sequence_length + 1]
        expected, start = [], 0
        for position in range(sequence_length):
            start = position if first + position in starts else start
            expected.append(start)
        assert sample.document_start_per_token().dtype == np.int64
        assert sample.document_start_per_token().tolist() == expected
        assert sample.document_starts.tolist() == [
            p - first for p in sorted(starts) if 0 <= p - first < sequence_length
        ]


def test_a_document_that_began_before_the_window_starts_at_0() -> None:
    sample = Sample(np.zeros(7, np.int64), np.array([2, 3]))
    assert sample.document_start_per_token().tolist() == [0, 0, 2, 3, 3, 3]
    assert Sample(np.zeros(4, np.int64), np.empty(0, np.int64)).document_start_per_token().tolist() == [0, 0, 0]


def test_large_vocabularies_take_four_bytes(write_split: WriteSplit) -> None:
    dataset = TokenDataset(write_split([[70_000, 99_999, 0]], "uint32"), "train", 2)
    assert dataset[0].tokens.tolist() == [70_000, 99_999, 0]


def test_few_open_shards_are_enough(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = TokenDataset(prepared, "train", 64)
    monkeypatch.setattr(dataset_module, "_OPEN_SHARDS", 1)
    dataset = TokenDataset(prepared, "train", 64)
    for g in [*range(len(dataset)), *reversed(range(len(dataset)))]:
        np.testing.assert_array_equal(dataset[g].tokens, expected[g].tokens)


def test_outside_is_an_index_error(prepared: Path) -> None:
    dataset = TokenDataset(prepared, "train", 64)
    assert dataset.fingerprint == load_manifest(prepared).fingerprint
    for outside in (-1, len(dataset)):
        with pytest.raises(IndexError, match=rf"sample {outside} is outside \[0, {len(dataset)}\)"):
            dataset[outside]


def test_what_the_split_cannot_give_is_named(prepared: Path, write_split: WriteSplit) -> None:
    tokens = load_manifest(prepared).tokens("validation")
    assert len(TokenDataset(prepared, "validation", tokens - 1)) == 1
    with pytest.raises(
        UsageError, match=f"sequence_length={tokens} is too long .* has {tokens} tokens; choose {tokens - 1}"
    ):
        TokenDataset(prepared, "validation", tokens)
    with pytest.raises(UsageError, match="sequence_length=0 is not a length"):
        TokenDataset(prepared, "validation", 0)
    with pytest.raises(
        UsageError, match="has no split validation, only train; prepare the data with a validation_fr"
    ):
        TokenDataset(write_split(DOCUMENTS), "validation", 2)


@pytest.mark.parametrize("kind", ["tok", "len"])
def test_a_flipped_byte_names_shard_and_member(write_split: WriteSplit, kind: str) -> None:
    folder = write_split(DOCUMENTS, member_tokens=10, shard_tokens=20)
    shard = folder / "train-00001.tar"
    member = index_of(shard)[1]
    assert member.group == 4
    data = bytearray(shard.read_bytes())
    data[member.offset if kind == "tok" else member.lengths_offset] ^= 0x10
    shard.write_bytes(data)

    dataset = TokenDataset(folder, "train", 1)
    first_bad = 31
    for g in range(first_bad - 1):  # everything before the damaged member is still read
        dataset[g]
    with pytest.raises(RunError) as error:
        dataset[first_bad]
    expected = member.crc32 if kind == "tok" else member.lengths_crc32
    message = str(error.value)
    assert (
        f"shard {shard}, member 000000004.{kind} is damaged: expected crc32 {expected:08x}, actual "
        in message
    )
    with pytest.raises(RunError):  # and it stays refused
        dataset[first_bad]


def test_damage_elsewhere_does_not_stop_a_sample(write_split: WriteSplit) -> None:
    folder = write_split(DOCUMENTS, member_tokens=10)
    shard = folder / "train-00000.tar"
    data = bytearray(shard.read_bytes())
    data[index_of(shard)[-1].offset] ^= 1
    shard.write_bytes(data)
    assert TokenDataset(folder, "train", 3)[0].tokens.tolist() == [1, 2, 0, 3]


def test_a_cut_or_missing_shard_is_found_at_once(copy: Path) -> None:
    shard = copy / "train-00001.tar"
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 512)
    with pytest.raises(
        RunError, match=f"shard {shard} has {size - 512} bytes and the manifest says {size}; restore it"
    ):
        TokenDataset(copy, "train", 8)
    shard.unlink()
    with pytest.raises(
        RunError, match=rf"shard {shard} cannot be read \(No such file or directory\); restore it"
    ):
        TokenDataset(copy, "train", 8)


def test_a_damaged_or_missing_index_is_named(copy: Path) -> None:
    index = copy / "train-00000.idx.npy"
    data = bytearray(index.read_bytes())
    data[-1] ^= 1
    index.write_bytes(data)
    dataset = TokenDataset(copy, "train", 8)
    with pytest.raises(
        RunError, match=f"index {index} is damaged: its sha256 is [0-9a-f]+ and the manifest says"
    ):
        dataset[0]
    index.unlink()
    with pytest.raises(RunError, match=rf"index {index} cannot be read \(No such file"):
        dataset[0]
