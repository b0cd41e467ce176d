"""Windows over shards: the plain concatenation of the documents, and no silent damage."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trine.configs.errors import RunError, UsageError
from trine.data_pipeline.dataset import Sample, TokenDataset
from trine.data_pipeline.shards.manifest import MANIFEST, load_manifest, write_manifest
from trine.data_pipeline.shards.member_index import Member, dump_index, parse_index
from trine.data_pipeline.shards.open_shards import OPEN_SHARDS
from trine.data_pipeline.shards.reader import Damage

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
        assert sample.positions().dtype == np.int64
        assert sample.positions().tolist() == [position - start for position, start in enumerate(expected)]
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


def shard_of(dataset: TokenDataset, g: int) -> int:
    """Number of the shard in which sample ``g`` begins."""
    ends = np.cumsum([record.tokens for record in dataset.manifest.splits[dataset.split]])
    return int(ends.searchsorted(g * dataset.sequence_length, "right"))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_two_open_shards_are_enough(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [sample.tokens for sample in map(TokenDataset(prepared, "train", 64).__getitem__, range(20, 200))]
    monkeypatch.setattr(OPEN_SHARDS, "limit", 2)
    dataset = TokenDataset(prepared, "train", 64)
    dataset[0]
    before = descriptors()
    for g in [*range(20, 200), *reversed(range(20, 200))]:
        np.testing.assert_array_equal(dataset[g].tokens, expected[g - 20])
    assert len(OPEN_SHARDS) == 2
    assert shard_of(dataset, 199) - shard_of(dataset, 20) > 2
    assert descriptors() <= before + 1


def test_many_threads_read_what_one_reads(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OPEN_SHARDS, "limit", 3)
    one, shared = (TokenDataset(prepared, "train", 33) for _ in range(2))
    expected = [one[g] for g in range(len(one))]
    ids = np.random.default_rng(0).integers(0, len(one), 6 * len(one))
    with ThreadPoolExecutor(16) as threads:
        for g, sample in zip(ids, threads.map(shared.__getitem__, ids), strict=True):
            np.testing.assert_array_equal(sample.tokens, expected[g].tokens)
            np.testing.assert_array_equal(sample.document_starts, expected[g].document_starts)


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
    with pytest.raises(UsageError, match="has no split validation, only train; prepare the data with a validation_fr"):
        TokenDataset(write_split(DOCUMENTS), "validation", 2)


@pytest.mark.parametrize("kind", ["tok", "len"])
def test_a_flipped_byte_names_shard_and_member(write_split: WriteSplit, kind: str) -> None:
    folder = write_split(DOCUMENTS, member_tokens=10, shard_tokens=20)
    shard = folder / "train-00000-001.tar"
    member = index_of(shard)[1]
    assert member.group == 4
    data = bytearray(shard.read_bytes())
    data[member.offset if kind == "tok" else member.lengths_offset] ^= 0x10
    shard.write_bytes(data)

    dataset = TokenDataset(folder, "train", 1)
    first_bad = 31
    for g in range(first_bad - 1):  # everything before the damaged member is still read
        dataset[g]
    with pytest.raises(Damage) as error:
        dataset[first_bad]
    expected = member.crc32 if kind == "tok" else member.lengths_crc32
    reason = f"is damaged: expected crc32 {expected:08x}, actual "
    assert f"shard {shard}, member 00000-000004.{kind} {reason}" in str(error.value)
    assert str(error.value).endswith("; restore it from a copy, or prepare the data again")
    assert error.value.shard == str(shard)
    assert error.value.member == f"00000-000004.{kind}"
    assert error.value.reason.startswith(reason)
    with pytest.raises(Damage):  # and it stays refused
        dataset[first_bad]


def test_damage_elsewhere_does_not_stop_a_sample(write_split: WriteSplit) -> None:
    folder = write_split(DOCUMENTS, member_tokens=10)
    shard = folder / "train-00000-000.tar"
    data = bytearray(shard.read_bytes())
    data[index_of(shard)[-1].offset] ^= 1
    shard.write_bytes(data)
    assert TokenDataset(folder, "train", 3)[0].tokens.tolist() == [1, 2, 0, 3]


def shards_of(folder: Path) -> list[Path]:
    return [folder / record.name for record in load_manifest(folder).splits["train"]]


def test_a_missing_or_cut_shard_stops_only_its_samples(copy: Path) -> None:
    first, *_, last = shards_of(copy)
    size = first.stat().st_size
    with first.open("r+b") as file:
        file.truncate(size - 512)
    last.unlink()
    dataset = TokenDataset(copy, "train", 8)
    with pytest.raises(Damage, match=f"shard {first} has {size - 512} bytes and the manifest says {size}; restore it"):
        dataset[0]
    with pytest.raises(
        Damage, match=rf"shard {last} cannot be read \(No such file or directory\); restore it"
    ) as error:
        dataset[len(dataset) - 1]
    assert (error.value.shard, error.value.member) == (str(last), None)
    inside_second = next(g for g in range(len(dataset)) if shard_of(dataset, g) == 1)
    assert dataset[inside_second].tokens.shape == (9,)


def test_a_shard_that_is_cut_while_it_is_open_is_damage(copy: Path) -> None:
    dataset = TokenDataset(copy, "train", 8)
    dataset[0]
    os.truncate(shards_of(copy)[0], 512)
    with pytest.raises(Damage, match=r"ends before byte \d+ and the manifest says \d+; restore it"):
        dataset[0]


def test_files_are_checked_by_their_sizes(copy: Path) -> None:
    dataset = TokenDataset(copy, "train", 8)
    dataset.check_files()
    first, second, third, *_ = shards_of(copy)
    size, files = second.stat().st_size, 2 * len(shards_of(copy))
    os.truncate(second, size - 1)
    third.with_suffix(".idx.npy").unlink()
    with pytest.raises(
        RunError,
        match=rf"{second} has {size - 1} bytes and the manifest says {size} "
        rf"\(2 of the {files} files of the split train are wrong\); restore them",
    ):
        dataset.check_files()
    first.unlink()
    with pytest.raises(RunError, match=rf"{first} is missing \(3 of the {files} files"):
        dataset.check_files()
    shutil.rmtree(copy)
    with pytest.raises(RunError, match=rf"the files of {copy} cannot be listed \(No such file or directory\)"):
        dataset.check_files()


class Failing:
    """A system call that fails with ``code`` a number of times, and then does what it does."""

    def __init__(self, call: Callable[..., Any], code: int, times: int) -> None:
        self.call, self.code, self.times = call, code, times

    def __call__(self, *arguments: Any) -> Any:
        if self.times:
            self.times -= 1
            raise OSError(self.code, os.strerror(self.code))
        return self.call(*arguments)


OUTAGES = (errno.ESTALE, errno.EACCES, errno.ETIMEDOUT, errno.ENOTCONN, errno.EIO)


@pytest.mark.parametrize("call", ["pread", "open", "fstat"])
@pytest.mark.parametrize("code", OUTAGES, ids=errno.errorcode.get)
def test_a_file_system_that_comes_back_is_read_on(
    copy: Path, call: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = TokenDataset(copy, "train", 8)[0].tokens
    dataset = TokenDataset(copy, "train", 8)
    monkeypatch.setattr(os, call, Failing(getattr(os, call), code, 1))
    np.testing.assert_array_equal(dataset[0].tokens, expected)


@pytest.mark.parametrize("call", ["pread", "open", "fstat"])
@pytest.mark.parametrize("code", OUTAGES, ids=errno.errorcode.get)
def test_a_file_system_that_fails_is_no_damage_and_a_bad_sector_is(
    copy: Path, call: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = TokenDataset(copy, "train", 8)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, Failing(getattr(os, call), code, -1))
        with pytest.raises(RunError, match=rf"shard {shards_of(copy)[0]} cannot be read \({os.strerror(code)}\)") as error:
            dataset[0]
    assert isinstance(error.value, Damage) == (code == errno.EIO)
    assert dataset[0].tokens.shape == (9,)


def test_what_was_replaced_meanwhile_is_verified_anew(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = TokenDataset(copy, "train", 8)
    dataset[0]
    shard = shards_of(copy)[0]
    data = bytearray(shard.read_bytes())
    data[512] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    monkeypatch.setattr(os, "pread", Failing(os.pread, errno.ESTALE, 1))  # of the file that is no longer there
    with pytest.raises(Damage, match="expected crc32"):
        dataset[0]


@pytest.mark.parametrize("mount_point_stays", [False, True])
def test_a_file_system_that_was_unmounted_is_no_damage(copy: Path, mount_point_stays: bool) -> None:
    dataset = TokenDataset(copy, "train", 8)
    copy.rename(copy.with_name("unmounted"))
    if mount_point_stays:
        copy.mkdir()
    with pytest.raises(RunError, match=r"cannot be read \(No such file or directory\); check the file system") as error:
        dataset[0]
    assert not isinstance(error.value, Damage)


def test_a_manifest_that_was_read_before_is_not_read_again(copy: Path) -> None:
    expected = TokenDataset(copy, "train", 8)
    (copy / MANIFEST).unlink()
    given = TokenDataset(copy, "train", 8, manifest=expected.manifest)
    assert given.fingerprint == expected.fingerprint
    np.testing.assert_array_equal(given[5].tokens, expected[5].tokens)


def test_a_damaged_or_missing_index_is_named(copy: Path) -> None:
    index = shards_of(copy)[0].with_suffix(".idx.npy")
    data = bytearray(index.read_bytes())
    data[-1] ^= 1
    index.write_bytes(data)
    dataset = TokenDataset(copy, "train", 8)
    with pytest.raises(Damage, match=f"index {index} is damaged: its sha256 is [0-9a-f]+ and the manifest says"):
        dataset[0]
    index.unlink()
    with pytest.raises(Damage, match=rf"index {index} cannot be read \(No such file"):
        dataset[0]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"no index", r"it is not a \.npy file of int64"),
        (dump_index([]), "it lists 0 tokens and the manifest says 44"),
        (dump_index([Member(512, 5, 0, 1536, 1, 0, 0)]), "it lists 5 tokens and the manifest says 44"),
        (dump_index([Member(512, 44, 0, 1536, 1 << 29, 0, 0)]), r"its last member ends at byte \d+ and the manifest"),
        (dump_index([Member(512, 44, 0, 1536, 0, 0, 0)]), "its row 0 cannot be that of a member"),
        (dump_index([Member(512, -44, 0, 1536, 1, 0, 0)]), "its row 0 cannot be that of a member"),
        (dump_index([Member(1 << 62, 44, 0, 1536, 1, 0, 0)]), "its row 0 cannot be that of a member"),
        (dump_index([Member(512, (1 << 63) - 1, 0, 512, 1, 0, 0)]), "its row 0 cannot be that of a member"),
        (dump_index([Member(512, 20, 0, 1536, 1, 0, 0), Member(512, 23, 0, 1536, 1, 0, 1)]), "its row 1 cannot be"),
        (dump_index([Member(512, 44, 0, 1536, 1, 0, 0)]).replace(b"(1, 7)", b"(9, 7)"), "it is not a"),
        (b"\x93NUMPY\x01\x00\x76\x00{'descr': '<i8', 'fortran_order': False, 'shape': (999999999, 7), }\n", "it is not a"),
    ],
)
def test_an_index_that_agrees_only_with_its_checksum_is_damage(
    write_split: WriteSplit, data: bytes, complaint: str
) -> None:
    folder = write_split(DOCUMENTS)
    (folder / "train-00000-000.idx.npy").write_bytes(data)
    manifest = load_manifest(folder)
    record = manifest.splits["train"][0].model_copy(update={"index_sha256": sha256(data).hexdigest()})
    write_manifest(folder, manifest.model_copy(update={"splits": {"train": (record,)}}))
    with pytest.raises(Damage, match=complaint):
        TokenDataset(folder, "train", 2)[0]


def test_too_few_descriptors_are_no_damage(write_split: WriteSplit) -> None:
    dataset = TokenDataset(write_split(DOCUMENTS), "train", 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = os.open("/", os.O_RDONLY)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 1, hard))
        with pytest.raises(RunError, match="Too many open files.*raise the limit of the process") as error:
            dataset[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(taken)
    assert not isinstance(error.value, Damage)
    assert dataset[0].tokens.tolist() == [1, 2, 0]
