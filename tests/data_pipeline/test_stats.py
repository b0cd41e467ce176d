"""Statistics against a count of the documents one by one."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_folder import LENGTHS, write_folder

from trine.configs.errors import RunError, UsageError
from trine.data_pipeline.shards.manifest import write_manifest
from trine.data_pipeline.shards.member_index import Member, dump_index, index_name
from trine.data_pipeline.shards.stats import LengthCounts, join_pieces, read_stats


def counts(lengths: list[int]) -> LengthCounts:
    return LengthCounts(np.array([length]) for length in lengths)


def test_documents_of_every_split_are_counted_over_members_shards_and_chunks(tmp_path: Path) -> None:
    manifest = write_folder(tmp_path)
    calls: list[tuple[int, int]] = []
    stats = read_stats(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert stats.manifest == manifest
    assert calls == [(number, 9) for number in range(1, 10)]
    assert list(stats.splits) == ["train", "validation"]
    for name, split in stats.splits.items():
        lengths = sorted(length for chunk in LENGTHS[name] for length in chunk)
        assert split.lengths.documents == len(lengths) == manifest.documents(name)
        assert split.lengths.tokens == sum(lengths) == manifest.tokens(name)
        assert split.lengths.longest == max(lengths)
        assert split.shards == len(manifest.splits[name])
        assert split.bytes == sum((tmp_path / record.name).stat().st_size for record in manifest.splits[name])
        assert [split.lengths.quantile((n + 1) / len(lengths)) for n in range(len(lengths))] == lengths


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=200))
def test_numbers_agree_with_a_count_one_by_one(lengths: list[int]) -> None:
    found = counts(lengths)
    assert (found.documents, found.tokens, found.longest) == (len(lengths), sum(lengths), max(lengths))
    assert found.mean == sum(lengths) / len(lengths)
    for share in (0.5, 0.9, 0.99, 1.0):
        assert found.quantile(share) == np.quantile(lengths, share, method="inverted_cdf")
    for length in (1, 100, 2048, 5000):
        assert found.share_fitting(length) == sum(each <= length for each in lengths) / len(lengths)
    histogram = found.histogram()
    assert [bucket.last + 1 for bucket in histogram[:-1]] == [bucket.first for bucket in histogram[1:]]
    assert histogram[0].first <= min(lengths) and max(lengths) <= histogram[-1].last
    for bucket in histogram:
        inside = [length for length in lengths if bucket.first <= length <= bucket.last]
        assert (bucket.documents, bucket.tokens) == (len(inside), sum(inside))
        assert bucket.last + 1 == 2 * bucket.first


def test_ranges_change_at_powers_of_two() -> None:
    histogram = counts([1, 2, 3, 4, 2047, 2048, (1 << 40) - 1, 1 << 40]).histogram()
    documents = {bucket.first: bucket.documents for bucket in histogram if bucket.documents}
    assert documents == {1: 1, 2: 2, 4: 1, 1024: 1, 2048: 1, 1 << 39: 1, 1 << 40: 1}
    assert len(histogram) == 41


def test_pieces_are_joined_to_documents() -> None:
    members = [[3], [10], [0, 10], [0, 5, 1, 2], [10], [3]]
    joined = join_pieces(np.array(member) for member in members)
    assert np.concatenate(list(joined)).tolist() == [3, 25, 1, 2, 10, 3]


def test_more_members_than_are_counted_at_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 3000).tolist()
    found = counts(lengths)
    assert (found.documents, found.tokens) == (3000, sum(lengths))


def test_damage_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    shard, index = tmp_path / "train-00000-000.tar", tmp_path / "train-00000-001.idx.npy"
    whole = index.read_bytes()
    index.write_bytes(whole[:-1])
    with pytest.raises(RunError, match=f"index {index} is damaged; 'trine data verify' lists"):
        read_stats(tmp_path)
    index.unlink()
    with pytest.raises(RunError, match=f"index {index} cannot be read"):
        read_stats(tmp_path)
    index.write_bytes(whole)
    data = bytearray(shard.read_bytes())
    data[3584] ^= 1
    shard.write_bytes(data)
    with pytest.raises(RunError, match=f"shard {shard} is damaged at byte 3584"):
        read_stats(tmp_path)
    shard.write_bytes(data[:4096])
    with pytest.raises(RunError, match=f"shard {shard} has 4096 bytes and the manifest says 10240"):
        read_stats(tmp_path)
    shard.unlink()
    with pytest.raises(RunError, match=f"shard {shard} cannot be read"):
        read_stats(tmp_path)


@pytest.mark.parametrize(
    ("lengths", "complaint"), [([], "row 0 cannot be that of a member"), ([0], "damaged at byte 1536"), ([2, 0, 1], "at byte 1")]
)
def test_what_is_wrong_under_its_checksum_is_refused(tmp_path: Path, lengths: list[int], complaint: str) -> None:
    manifest = write_folder(tmp_path, {"train": [[3]]})
    (record,) = manifest.splits["train"]
    pieces = np.array(lengths, "<u4").tobytes()
    shard = tmp_path / record.name
    data = shard.read_bytes()
    shard.write_bytes(data[:1536] + pieces + data[1536 + len(pieces) :])
    index = dump_index([Member(512, 3, 0, 1536, len(lengths), crc32(pieces), 0)])
    (tmp_path / index_name(record.name)).write_bytes(index)
    changed = record.model_copy(update={"index_sha256": sha256(index).hexdigest()})
    write_manifest(tmp_path, manifest.model_copy(update={"splits": {"train": (changed,)}}))
    with pytest.raises(RunError, match=complaint):
        read_stats(tmp_path)


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no prepared data"):
        read_stats(tmp_path)
