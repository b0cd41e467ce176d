"""Verification: every kind of damage is told with its file and its first bytes, and nothing else is."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from small_folder import LENGTHS, write_folder

from trine.configs.errors import UsageError
from trine.data_pipeline.corpus.tokenizer import train_byte_level_bpe
from trine.data_pipeline.durable import write_durably
from trine.data_pipeline.shards.contents import ContentCheck
from trine.data_pipeline.shards.manifest import load_manifest, write_manifest
from trine.data_pipeline.shards.member_index import Member, dump_index, parse_index
from trine.data_pipeline.shards.verify import verify

SHARD, INDEX = "train-00000-000.tar", "train-00000-000.idx.npy"
"""Tokens of its members: 3, 10, 10. So its first member has its tokens in bytes 512-517 and its lengths in
1536-1539, the second has them in 2560-2579 and 3584-3587, the third in 4608-4627 and 5632-5639; tar's end mark takes
all from 6144 to 10239. Its index has a header of 128 bytes and rows of 56."""

Fault = Callable[[Path], object]


def flip(name: str, *positions: int) -> Fault:
    def fault(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        for position in positions:
            data[position] ^= 0x40
        (folder / name).write_bytes(data)

    return fault


def cut(name: str, size: int) -> Fault:
    return lambda folder: os.truncate(folder / name, size)


def extend(name: str, data: bytes) -> Fault:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + data)


def remove(name: str) -> Fault:
    return lambda folder: (folder / name).unlink()


def replace(name: str, data: bytes) -> Fault:
    return lambda folder: (folder / name).write_bytes(data)


def swap(*names: str) -> Fault:
    """The first half of the names for the second half."""

    def fault(folder: Path) -> None:
        half = len(names) // 2
        for first, second in zip(names[:half], names[half:], strict=True):
            a, b = (folder / first).read_bytes(), (folder / second).read_bytes()
            (folder / first).write_bytes(b)
            (folder / second).write_bytes(a)

    return fault


def of_another(*names: str) -> Fault:
    """Files of the same names of a folder whose tokens and lengths are others."""

    def fault(folder: Path) -> None:
        other = folder.parent / "other"
        write_folder(other, {**LENGTHS, "train": [[4, 26, 2, 3, 11, 4]]}, seed=1)
        for name in names:
            shutil.copy(other / name, folder / name)

    return fault


def edit(field: str, value: object) -> Fault:
    """Change the record of SHARD in the manifest."""

    def fault(folder: Path) -> None:
        manifest = load_manifest(folder)
        first, *rest = manifest.splits["train"]
        splits = {**manifest.splits, "train": (first.model_copy(update={field: value}), *rest)}
        write_manifest(folder, manifest.model_copy(update={"splits": splits}))

    return fault


def edit_whole(**values: object) -> Fault:
    return lambda folder: write_manifest(folder, load_manifest(folder).model_copy(update=values))


def reorder(folder: Path) -> None:
    manifest = load_manifest(folder)
    first, second, *rest = manifest.splits["train"]
    splits = {**manifest.splits, "train": (second, first, *rest)}
    write_manifest(folder, manifest.model_copy(update={"splits": splits}))


def all_of(*faults: Fault) -> Fault:
    def fault(folder: Path) -> None:
        for each in faults:
            each(folder)

    return fault


FAULTS: dict[str, tuple[Fault, list[str]]] = {
    "tokens": (
        flip(SHARD, 2565),
        ["train-00000-000.tar, bytes 2560-2579: the tokens in 00000-000001.tok do not have their checksum"],
    ),
    "lengths": (
        flip(SHARD, 3584),
        ["train-00000-000.tar, bytes 3584-3587: the document lengths in 00000-000001.len do not have their checksum"],
    ),
    "header": (
        flip(SHARD, 2050),
        ["train-00000-000.tar, bytes 2048-2559: the tar header of 00000-000001.tok is not as it was written"],
    ),
    "padding": (
        flip(SHARD, 600),
        ["train-00000-000.tar, bytes 518-1023: the padding behind 00000-000000.tok is not as it was written"],
    ),
    "end": (
        flip(SHARD, 10239),
        ["train-00000-000.tar, bytes 6144-10239: the end of the archive is not as it was written"],
    ),
    "several places": (
        flip(SHARD, 5632, 2050, 513),
        [
            "train-00000-000.tar, bytes 512-517: the tokens in 00000-000000.tok do not have their checksum; "
            "2 more places are damaged"
        ],
    ),
    "cut between members": (
        cut(SHARD, 4096),
        ["train-00000-000.tar, bytes 4096-10239: it is cut short: it has 4096 of 10240 bytes"],
    ),
    "cut in a member": (
        cut(SHARD, 2570),
        ["train-00000-000.tar, bytes 2570-10239: it is cut short: it has 2570 of 10240 bytes"],
    ),
    "cut and damaged before": (
        all_of(cut(SHARD, 2570), flip(SHARD, 512)),
        [
            "train-00000-000.tar, bytes 512-517: the tokens in 00000-000000.tok do not have their checksum",
            "train-00000-000.tar, bytes 2570-10239: it is cut short: it has 2570 of 10240 bytes",
        ],
    ),
    "empty": (
        cut(SHARD, 0),
        ["train-00000-000.tar, bytes 0-10239: it is cut short: it has 0 of 10240 bytes"],
    ),
    "bytes behind": (
        extend(SHARD, b"more"),
        ["train-00000-000.tar, bytes 10240-10243: it has 4 bytes behind its end"],
    ),
    "shard missing": (remove(SHARD), ["train-00000-000.tar: it is missing"]),
    "shard a folder": (
        all_of(remove(SHARD), lambda folder: (folder / SHARD).mkdir()),
        ["train-00000-000.tar: it cannot be read (Is a directory)"],
    ),
    "shard of another preparation": (
        of_another(SHARD),
        [
            "train-00000-000.tar: of its 3 members, none holds the tokens that its index lists: "
            "it is a shard of another preparation, or was overwritten"
        ],
    ),
    "shard and index of another preparation": (
        of_another(SHARD, INDEX),
        [
            "train-00000-000.tar: it and its index train-00000-000.idx.npy agree with each other and not with the "
            "manifest: they are of another preparation"
        ],
    ),
    "shards swapped": (
        swap(SHARD, "train-00000-001.tar"),
        [
            "train-00000-000.tar: it holds what train-00000-001.tar should hold: "
            "the two were swapped, or one was copied over the other",
            "train-00000-001.tar: it holds what train-00000-000.tar should hold: "
            "the two were swapped, or one was copied over the other",
        ],
    ),
    "indexes swapped": (
        swap(INDEX, "train-00000-001.idx.npy"),
        [
            "train-00000-000.idx.npy: it holds what train-00000-001.idx.npy should hold: "
            "the two were swapped, or one was copied over the other",
            "train-00000-001.idx.npy: it holds what train-00000-000.idx.npy should hold: "
            "the two were swapped, or one was copied over the other",
        ],
    ),
    "shards swapped with their indexes": (
        swap(SHARD, INDEX, "train-00000-001.tar", "train-00000-001.idx.npy"),
        [
            f"{name}: it holds what {other} should hold: the two were swapped, or one was copied over the other"
            for name, other in (
                (INDEX, "train-00000-001.idx.npy"),
                (SHARD, "train-00000-001.tar"),
                ("train-00000-001.idx.npy", INDEX),
                ("train-00000-001.tar", SHARD),
            )
        ],
    ),
    "index": (
        flip(INDEX, 128 + 56 + 9, 128 + 56 + 20),
        ["train-00000-000.idx.npy, bytes 193-204: it is damaged: it differs from the index of its shard"],
    ),
    "index cut": (
        cut(INDEX, 130),
        ["train-00000-000.idx.npy, bytes 130-295: it is damaged: it differs from the index of its shard"],
    ),
    "index missing": (remove(INDEX), ["train-00000-000.idx.npy: it is missing"]),
    "index missing and padding damaged": (
        all_of(remove(INDEX), flip(SHARD, 600)),
        [
            "train-00000-000.idx.npy: it is missing",
            "train-00000-000.tar, bytes 518-1023: the padding behind 00000-000000.tok is not as it was written",
        ],
    ),
    "manifest: bytes": (
        edit("bytes", 20480),
        [
            "index.json: it was changed: bytes of train-00000-000.tar is 20480 there, "
            "and 10240 by the shard and its index"
        ],
    ),
    "manifest: tokens": (
        edit("tokens", 24),
        ["index.json: it was changed: tokens of train-00000-000.tar is 24 there, and 23 by the shard and its index"],
    ),
    "manifest: documents": (
        edit("documents", 3),
        ["index.json: it was changed: documents of train-00000-000.tar is 3 there, and 2 by the shard and its index"],
    ),
    "manifest: order": (
        reorder,
        [
            "index.json: train-00000-001.tar has no place where it stands in the split train",
            "index.json: train-00000-000.tar has no place where it stands in the split train",
        ],
    ),
    "manifest: vocabulary": (
        edit_whole(vocabulary_size=70_000),
        [
            "index.json: its vocabulary of 70000 is not stored as uint16",
            "index.json: its vocabulary_size is 70000, and that of the tokenizer is 257",
        ],
    ),
    "tokenizer missing": (remove("tokenizer.json"), ["tokenizer.json: it is missing"]),
    "temporary file": (
        replace("train-00007-000.tar.0a1b2c3d.tmp", b"some"),
        [
            "train-00007-000.tar.0a1b2c3d.tmp: warning: it was left by a preparation that was cut short, "
            "and may be deleted"
        ],
    ),
    "mark of a preparation": (
        replace("unfinished.json", b"{}"),
        ["unfinished.json: warning: it was left by a preparation that was cut short, and may be deleted"],
    ),
    "stray file": (
        replace("train-00007-000.tar", b"some"),
        ["train-00007-000.tar: warning: the manifest does not name it, so nothing reads it"],
    ),
}


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without faults, to be left so."""
    folder = tmp_path_factory.mktemp("whole")
    write_folder(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "data"))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_with_its_place(name: str, folder: Path) -> None:
    fault, expected = FAULTS[name]
    fault(folder)
    problems = verify(folder, workers=2)
    assert [str(problem) for problem in problems] == expected
    assert all(problem.is_warning == ("warning" in str(problem)) for problem in problems)


def test_whole_data_have_no_problem_and_progress_reaches_the_end(whole: Path) -> None:
    manifest = load_manifest(whole)
    calls: list[tuple[int, int]] = []
    assert verify(whole, workers=1, progress=lambda done, total: calls.append((done, total))) == []
    total = sum(record.bytes for records in manifest.splits.values() for record in records)
    assert len(calls) == sum(map(len, manifest.splits.values()))
    assert [call[0] for call in calls] == sorted({call[0] for call in calls})
    assert calls[-1] == (total, total)
    assert {call[1] for call in calls} == {total}


def test_a_digest_in_the_manifest_that_no_file_has(folder: Path) -> None:
    edit("sha256", "0" * 64)(folder)
    (problem,) = verify(folder)
    assert problem.file == "index.json"
    assert problem.sentence.startswith(f"it was changed: sha256 of {SHARD} is {'0' * 64} there, and ")
    edit("index_sha256", "1" * 64)(folder)
    edit("sha256", load_manifest(folder).splits["train"][1].sha256)(folder)
    assert [problem.file for problem in verify(folder)] == [SHARD]  # now nothing says that the files are right


def test_an_index_digest_in_the_manifest_that_the_index_has_not(folder: Path) -> None:
    edit("index_sha256", "1" * 64)(folder)
    (problem,) = verify(folder)
    assert problem.file == "index.json"
    assert problem.sentence.startswith(f"it was changed: index_sha256 of {SHARD} is {'1' * 64} there, and ")


def test_damage_that_cannot_be_placed_without_the_index(folder: Path) -> None:
    remove(INDEX)(folder)
    flip(SHARD, 2565)(folder)
    missing, damaged = verify(folder)
    assert str(missing) == f"{INDEX}: it is missing"
    assert (damaged.file, damaged.span) == (SHARD, None)
    assert damaged.sentence.endswith("; without its index, the damaged bytes cannot be told")


def test_index_and_tokens_damaged(folder: Path) -> None:
    all_of(flip(INDEX, 200), flip(SHARD, 2565))(folder)
    index, shard = verify(folder)
    assert (index.file, index.span, shard.file, shard.span) == (INDEX, None, SHARD, None)
    assert "its sha256 is" in index.sentence


def test_a_foreign_tokenizer_and_a_damaged_one(folder: Path) -> None:
    write_durably(folder / "tokenizer.json", train_byte_level_bpe(["more more more"], 258).to_str().encode())
    (problem,) = verify(folder)
    assert problem.file == "tokenizer.json"
    assert problem.sentence.startswith("it is not the tokenizer that made these tokens: its sha256 is ")
    cut("tokenizer.json", 100)(folder)
    (problem,) = verify(folder)
    assert problem.sentence.startswith("it is damaged: its sha256 is ")


def test_a_damaged_manifest_is_the_only_problem(folder: Path) -> None:
    cut("index.json", 100)(folder)
    (problem,) = verify(folder)
    assert problem.file == "index.json"
    assert "is not JSON" in problem.sentence


@pytest.mark.parametrize(
    ("vocabulary", "span", "type_name"), [(257, range(2568, 2570), "uint16"), (70_000, range(2576, 2580), "uint32")]
)
def test_a_token_beyond_the_vocabulary_under_right_checksums(
    vocabulary: int, span: range, type_name: str, tmp_path: Path
) -> None:
    beyond = vocabulary + 5
    assert write_folder(tmp_path, beyond=beyond, vocabulary=vocabulary).dtype == type_name
    problem = verify(tmp_path)[-1]
    assert (problem.file, problem.span) == (SHARD, span)
    assert problem.sentence == f"token id {beyond} is beyond the vocabulary of {vocabulary}"


def test_another_end_of_document_in_the_manifest(folder: Path) -> None:
    edit_whole(eos_id=300)(folder)
    first, second, *rest = verify(folder)
    assert str(first) == "index.json: its end of document 300 is beyond its vocabulary of 257"
    assert str(second) == "index.json: its eos_id is 300, and that of the tokenizer is 0"
    found = {problem.file: problem for problem in rest}
    # Within a member the wrong end has its place; at the end of one, the next member begins too early.
    assert found["train-00000-001.tar"].span == range(520, 522)
    assert found["train-00000-001.tar"].sentence == (
        "a document ends with token id 0 and not with 300; 2 more members are wrong"
    )
    assert found[SHARD].sentence == "a document begins before the end of the preceding one"


@pytest.mark.parametrize(
    ("lengths", "begins_chunk", "sentence"),
    [
        ([2, 3], True, "the document lengths add up to 5 and the member has 6 tokens"),
        ([2, 0, 4], True, "a document has the length 0"),
        ([0, 2, 4], True, "the first document continues one that is not there"),
        ([0, 2, 4], False, None),
        ([2, 4], True, None),
        ([3, 3], True, "a document ends with token id 7 and not with 0"),
    ],
)
def test_contents_that_preparation_never_writes(
    whole: Path, lengths: list[int], begins_chunk: bool, sentence: str | None
) -> None:
    check = ContentCheck(load_manifest(whole), begins_chunk=begins_chunk)
    member = Member(512, 6, 0, 1536, len(lengths), 0, 0)
    check.add(member, np.array([5, 0, 7, 8, 9, 0], "<u2").tobytes(), np.array(lengths, "<u4").tobytes())
    assert [fault.sentence for fault in check.faults] == ([sentence] if sentence else [])


def test_an_index_under_its_checksum_that_is_none(folder: Path) -> None:
    rows = parse_index((folder / INDEX).read_bytes()).copy()
    rows[1, 0] += 512
    for data, sentence in (
        (dump_index([Member(*row) for row in rows.tolist()]), "its row 1 cannot be that of a member"),
        (b"nothing", "it is not the index of a shard"),
        (dump_index([Member(512, 1 << 40, 0, 1536 + (2 << 40), 1, 0, 0)]), "its row 0 cannot be that of a member"),
    ):
        (folder / INDEX).write_bytes(data)
        edit("index_sha256", sha256(data).hexdigest())(folder)
        (problem,) = verify(folder)
        assert problem.file == INDEX
        assert problem.sentence.startswith(sentence)


def test_a_tar_that_claims_more_than_it_holds_is_not_believed(folder: Path) -> None:
    header = tarfile.TarInfo("00000-000000.tok")
    header.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 50)}
    with tarfile.open(folder / SHARD, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(header)
    remove(INDEX)(folder)
    assert [problem.file for problem in verify(folder)] == [INDEX, SHARD]


def test_every_byte_matters(tmp_path: Path) -> None:
    """No single byte of any file, the manifest apart, can change without a problem in that very file."""
    write_folder(tmp_path, {"train": [[3, 4], [12]]})
    generator = np.random.default_rng(0)
    for path in sorted(tmp_path.iterdir()):
        if path.name == "index.json":
            continue
        data = path.read_bytes()
        for position in generator.integers(0, len(data), 12).tolist():
            flip(path.name, position)(tmp_path)
            problems = verify(tmp_path, workers=1)
            assert [problem.file for problem in problems] == [path.name], position
            assert problems[0].span is None or position in problems[0].span
            path.write_bytes(data)
    assert verify(tmp_path) == []


def test_wrong_use(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no prepared data"):
        verify(tmp_path)
    with pytest.raises(UsageError, match="is not there"):
        verify(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="workers=0"):
        verify(whole, workers=0)
