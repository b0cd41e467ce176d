"""Shards: plain webdataset tars, exact document boundaries, the same bytes every time."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trine.data_pipeline.shards.member_index import Member, document_starts, parse_index
from trine.data_pipeline.shards.writer import ShardWriter

UINT16 = np.dtype("<u2")
DOCUMENTS = [[1, 2, 0], [3] * 24 + [0], [0], [4, 0], [5] * 9 + [0], [6, 7, 0]]
"""With members of 10 tokens: a group, a document over three members, a group that begins with its end."""


def write(
    folder: Path, documents: list[list[int]], *, shard_tokens: int = 1000, member_tokens: int = 10
) -> list[str]:
    with ShardWriter(folder, "train", shard_tokens=shard_tokens, member_tokens=member_tokens) as writer:
        for document in documents:
            writer.add(np.array(document, UINT16))
        return [record.name for record in writer.finish()]


def groups(path: Path) -> list[tuple[str, list[int], list[int]]]:
    """(name, tokens, lengths) of every document group, read with tarfile alone."""
    with tarfile.open(path, "r:") as tar:
        payloads = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]
    names = [name.removesuffix(".tok") for name in payloads if name.endswith(".tok")]
    assert list(payloads) == [name + suffix for name in names for suffix in (".tok", ".len")]
    return [
        (
            name,
            np.frombuffer(payloads[name + ".tok"], UINT16).tolist(),
            np.frombuffer(payloads[name + ".len"], "<u4").tolist(),
        )
        for name in names
    ]


def test_only_documents_longer_than_a_member_are_split(tmp_path: Path) -> None:
    assert write(tmp_path, DOCUMENTS) == ["train-00000-000.tar"]
    assert groups(tmp_path / "train-00000-000.tar") == [
        ("00000-000000", [1, 2, 0], [3]),
        ("00000-000001", [3] * 10, [10]),
        ("00000-000002", [3] * 10, [0, 10]),
        ("00000-000003", [3] * 4 + [0, 0, 4, 0], [0, 5, 1, 2]),
        ("00000-000004", [5] * 9 + [0], [10]),
        ("00000-000005", [6, 7, 0], [3]),
    ]


def test_groups_are_numbered_through_shards_and_records_count_them(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train", shard_tokens=20, member_tokens=10) as writer:
        for document in DOCUMENTS:
            writer.add(np.array(document, UINT16))
        records = writer.finish()
    assert [(r.name, r.tokens, r.documents) for r in records] == [
        ("train-00000-000.tar", 23, 2),
        ("train-00000-001.tar", 21, 4),
    ]
    assert [name for name, _, _ in groups(tmp_path / "train-00000-001.tar")] == [
        "00000-000003",
        "00000-000004",
        "00000-000005",
    ]
    assert all((tmp_path / r.name).stat().st_size == r.bytes for r in records)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    member_tokens=st.integers(1, 25),
    shard_tokens=st.integers(20, 200),
)
def test_index_and_lengths_give_back_every_document(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], member_tokens: int, shard_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    documents = [[n + 1] * (length - 1) + [0] for n, length in enumerate(lengths)]
    names = write(folder, documents, shard_tokens=shard_tokens, member_tokens=member_tokens)
    tokens: list[int] = []
    starts: list[int] = []
    for name in names:
        data = (folder / name).read_bytes()
        for row in parse_index((folder / name).with_suffix(".idx.npy").read_bytes()):
            member = Member(*row.tolist())
            piece_lengths = np.frombuffer(data, "<u4", member.lengths, member.lengths_offset)
            assert piece_lengths.sum() == member.tokens <= member_tokens
            starts.extend((document_starts(piece_lengths) + len(tokens)).tolist())
            tokens.extend(np.frombuffer(data, UINT16, member.tokens, member.offset).tolist())
    assert tokens == [token for document in documents for token in document]
    assert starts == np.cumsum([0, *lengths[:-1]]).tolist()


def test_plain_webdataset_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_SECURE", "1")  # before the import: webdataset looks at it there
    import webdataset

    names = write(tmp_path, DOCUMENTS, shard_tokens=20)
    urls = [str(tmp_path / name) for name in names]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"00000-{n:06d}" for n in range(6)]
    tokens = np.concatenate([np.frombuffer(sample["tok"], UINT16) for sample in samples])
    assert tokens.tolist() == [token for document in DOCUMENTS for token in document]


def test_bytes_depend_on_the_documents_alone(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, DOCUMENTS, shard_tokens=20)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["train-00000-000.idx.npy", "train-00000-000.tar", "train-00000-001.idx.npy", "train-00000-001.tar"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    with tarfile.open(tmp_path / "one" / files[1]) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar.getmembers()} == {(0, 0, 0, "", "")}


def test_an_interrupted_shard_leaves_nothing(tmp_path: Path) -> None:
    def stop_midway() -> None:
        with ShardWriter(tmp_path, "train", shard_tokens=1000, member_tokens=10) as writer:
            for document in DOCUMENTS:
                writer.add(np.array(document, UINT16))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_midway()
    assert list(tmp_path.iterdir()) == []


def test_chunks_name_and_number_what_is_theirs(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "validation", 12, shard_tokens=20, member_tokens=10) as writer:
        for document in DOCUMENTS:
            writer.add(np.array(document, UINT16))
        names = [record.name for record in writer.finish()]
    assert names == ["validation-00012-000.tar", "validation-00012-001.tar"]
    assert groups(tmp_path / names[1])[0][0] == "00012-000003"


def test_a_document_has_an_end(tmp_path: Path) -> None:
    with (
        ShardWriter(tmp_path, "train") as writer,
        pytest.raises(ValueError, match="at least the token that ends it"),
    ):
        writer.add(np.array([], UINT16))


def test_an_index_is_what_it_should_be() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"it is not a \.npy file of int64 \(members, 7\)"):
        parse_index(buffer.getvalue())
