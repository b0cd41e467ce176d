"""Preparation from end to end: what goes in comes out, once, whole, and the same every time."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trine.configs.errors import RunError, UsageError
from trine.data_pipeline import encoding
from trine.data_pipeline.dataset import TokenDataset
from trine.data_pipeline.manifest import MANIFEST, UNFINISHED, Manifest, load_manifest
from trine.data_pipeline.prepare import prepare
from trine.data_pipeline.sources import STANDARD_LIBRARY, iter_documents
from trine.data_pipeline.splits import SPLITS, holdout_score, split_of
from trine.data_pipeline.tokenizer import load_tokenizer

VOCABULARY, SHARD_TOKENS = 300, 1200
"""As in the fixture ``prepared``."""


def run(inputs: Any, output: Path, **changes: Any) -> Manifest:
    arguments = {"train_tokenizer": VOCABULARY, "validation_fraction": 0.2, "shard_tokens": SHARD_TOKENS}
    return prepare([str(inputs)], output, **arguments | changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_documents_come_out_as_they_went_in(corpus: Path, prepared: Path) -> None:
    tokenizer = load_tokenizer(prepared / "tokenizer.json")
    tokenizer.encode_special_tokens = True
    manifest = load_manifest(prepared)
    for split in SPLITS:
        texts = [
            document.text
            for document in iter_documents([str(corpus)])
            if split_of(holdout_score(document.text), 0.2) == split
        ]
        expected = [token for text in texts for token in [*tokenizer.encode(text).ids, manifest.eos_id]]
        dataset = TokenDataset(prepared, split, 1)
        assert len(manifest.splits[split]) > 1, "the corpus of this test must need several shards"
        assert manifest.tokens(split) == len(expected) == len(dataset) + 1
        assert manifest.documents(split) == len(texts)
        stream = [int(dataset[0].tokens[0]), *(int(dataset[g].tokens[1]) for g in range(len(dataset)))]
        assert stream == expected


def test_manifest_describes_the_folder(corpus: Path, prepared: Path) -> None:
    manifest = load_manifest(prepared)
    assert (manifest.dtype, manifest.vocabulary_size, manifest.eos_id) == ("uint16", VOCABULARY, 0)
    assert manifest.request.sources == (str(corpus),)
    assert manifest.request.source_files == 32
    names = [record.name for split in SPLITS for record in manifest.splits[split]]
    indexes = [name.replace(".tar", ".idx.npy") for name in names]
    assert contents(prepared).keys() == {*names, *indexes, MANIFEST, "tokenizer.json"}


def test_a_second_preparation_has_the_same_bytes(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    assert run(corpus, tmp_path).fingerprint == load_manifest(prepared).fingerprint
    assert contents(tmp_path) == contents(prepared)


def test_a_finished_preparation_is_returned_at_once(corpus: Path, prepared: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()}
    said: list[str] = []
    assert run(f"{corpus}/", prepared, progress=said.append) == load_manifest(prepared)
    assert said == [f"{prepared} is prepared already"]
    assert {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"train_tokenizer": 400}, "trained_vocabulary is 300 there and 400 here"),
        ({"validation_fraction": 0.1}, "validation_fraction is 0.2 there and 0.1 here"),
        ({"shard_tokens": 800}, "shard_tokens is 1200 there and 800 here"),
    ],
)
def test_another_request_needs_another_folder(
    corpus: Path, prepared: Path, changes: dict[str, Any], difference: str
) -> None:
    with pytest.raises(
        UsageError, match=rf"holds another preparation \({difference}\); choose another"
    ) as error:
        run(corpus, prepared, **changes)
    assert str(prepared) in str(error.value)


def test_other_inputs_and_another_tokenizer_need_another_folder(
    corpus: Path, prepared: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"sources is .* there and .*more\.jsonl'\] here"):
        run(corpus / "more.jsonl", prepared)
    with pytest.raises(UsageError, match="tokenizer_sha256 is None there"):
        run(corpus, prepared, tokenizer=prepared / "tokenizer.json", train_tokenizer=None)
    grown = shutil.copytree(corpus, tmp_path / "grown")
    output = tmp_path / "out"
    run(grown, output)
    (grown / "late.txt").write_text("one more")
    with pytest.raises(UsageError, match="source_files is 32 there and 33 here"):
        run(grown, output)


def test_what_stops_midway_leaves_no_manifest_and_is_done_again(
    corpus: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        encoding, "SEGMENT_CHARACTERS", 1000
    )  # so that shards are finished before the bad line
    broken = shutil.copytree(corpus, tmp_path / "corpus")
    with (broken / "more.jsonl").open("a") as file:
        file.write("{\n")
    output = tmp_path / "out"
    tokenizer = prepared / "tokenizer.json"
    with pytest.raises(UsageError, match=r"more\.jsonl:11 is not valid JSON"):
        run(broken, output, tokenizer=tokenizer, train_tokenizer=None)
    left = contents(output)
    assert {"train-00000.tar", "train-00001.tar", UNFINISHED} <= left.keys()
    assert MANIFEST not in left
    with pytest.raises(UsageError, match="has not finished; run it again"):
        load_manifest(output)

    # What a kill may leave beside that, and a shard more than the second run will write.
    (output / "train-00099.tar").touch()
    (output / "validation-00000.idx.npy.tmp").touch()
    manifest = run(corpus, output, tokenizer=output / "tokenizer.json", train_tokenizer=None)
    assert tokenizer.read_bytes() == (output / "tokenizer.json").read_bytes()
    run(corpus, tmp_path / "clean", tokenizer=tokenizer, train_tokenizer=None)
    assert contents(output) == contents(tmp_path / "clean")
    assert manifest == load_manifest(tmp_path / "clean")


def test_an_interrupt_before_the_end_leaves_no_manifest(corpus: Path, tmp_path: Path) -> None:
    def interrupt(message: str) -> None:
        if message.startswith("tokenised"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path, progress=interrupt)
    assert MANIFEST not in contents(tmp_path)
    run(corpus, tmp_path)
    assert MANIFEST in contents(tmp_path)
    assert UNFINISHED not in contents(tmp_path)


def test_other_peoples_files_are_left_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "train-00000.tar").write_bytes(b"precious")
    with pytest.raises(
        UsageError, match="holds other files and no prepared data; choose a new or empty folder"
    ):
        run(corpus, tmp_path)
    assert contents(tmp_path) == {"train-00000.tar": b"precious"}
    with pytest.raises(UsageError, match=r"train-00000\.tar is a file; name a new folder"):
        run(corpus, tmp_path / "train-00000.tar")


def test_splits_are_a_function_of_the_text() -> None:
    scores = [holdout_score(f"document {n}") for n in range(4000)]
    # Four standard deviations of a binomial count.
    assert abs(sum(score < 0.1 for score in scores) - 400) < 4 * np.sqrt(4000 * 0.1 * 0.9)
    assert holdout_score("pinned") == 0.6741267504878246
    assert [split_of(0.1, 0.1), split_of(0.0999, 0.1), split_of(0.0, 0.0)] == ["train", "validation", "train"]


def test_a_corpus_that_cannot_be_split_is_named(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("a single document")
    with pytest.raises(UsageError) as error:
        run(path, tmp_path / "out", validation_fraction=0.02)
    assert str(error.value) == (
        "validation_fraction=0.02 holds out no document of 1; "
        "give more documents, or 0 for no validation split"
    )
    with pytest.raises(UsageError, match="leaves none to train on"):
        run(path, tmp_path / "out", validation_fraction=0.999)
    manifest = run(path, tmp_path / "out", validation_fraction=0.0)
    assert list(manifest.splits) == ["train"]
    with pytest.raises(UsageError, match="leaves none to train on"):
        prepare(
            [str(path)], tmp_path / "o", tokenizer=tmp_path / "out/tokenizer.json", validation_fraction=0.999
        )

    (tmp_path / "two.txt").write_text("another document")
    with pytest.raises(
        UsageError, match=r"no document of 2; give more documents, a fraction above 0\.\d{4}, "
    ):
        run(tmp_path, tmp_path / "out2", validation_fraction=0.0001)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"train_tokenizer": None}, "either a tokenizer.json or the size of a vocabulary to train"),
        ({"tokenizer": Path("t.json")}, "either a tokenizer.json or the size of a vocabulary to train"),
        ({"train_tokenizer": 100}, "vocabulary of 100 tokens cannot hold every byte; ask for 257 at least"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0 is not a fraction"),
        ({"validation_fraction": float("nan")}, "validation_fraction=nan is not a fraction"),
        ({"shard_tokens": 0}, "shard_tokens=0 leaves shards empty"),
        ({"tokenizer": Path("t.json"), "train_tokenizer": None}, "tokenizer t.json cannot be read"),
    ],
)
def test_a_wrong_request_touches_nothing(
    corpus: Path, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        run(corpus, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fails_is_a_failure_and_not_wrong_use(corpus: Path) -> None:
    with pytest.raises(RunError, match=r"preparing /dev/full/out failed: .*Not a directory"):
        run(corpus, Path("/dev/full/out"))


def test_the_standard_library_can_be_prepared(tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for n, document in enumerate(itertools.islice(iter_documents([STANDARD_LIBRARY]), 8)):
        (few / f"{n}.py").write_bytes(document.text.encode())
    manifest = run(few, tmp_path / "out", validation_fraction=0.0, train_tokenizer=512)
    dataset = TokenDataset(tmp_path / "out", "train", manifest.tokens("train") - 1)
    tokens = dataset[0].tokens
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    decoded = [tokenizer.decode(part.tolist()) for part in np.split(tokens, np.flatnonzero(tokens == 0))]
    assert decoded[:-1] == [document.text for document in iter_documents([str(few)])]


def test_preparation_imports_neither_torch_nor_webdataset() -> None:
    # The command line would otherwise wait seconds for torch before it says anything.
    program = "import sys, trine.data_pipeline.prepare; print({'torch', 'webdataset'} & sys.modules.keys())"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


def test_inputs_are_kept_as_they_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stdlib").mkdir()  # a folder of that name is not the standard library
    Path("stdlib/a.txt").write_text("mine")
    manifest = run("./stdlib/", tmp_path / "out", validation_fraction=0)
    assert manifest.request.sources == ("./stdlib",)
    assert manifest.documents("train") == 1
    assert run("./stdlib", tmp_path / "out", validation_fraction=0.0) == manifest
