"""Preparation from end to end: what goes in comes out, once, whole, and the same every time."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from trine.configs.errors import RunError, UsageError
from trine.data_pipeline.corpus.sources import STANDARD_LIBRARY, iter_documents
from trine.data_pipeline.dataset import TokenDataset
from trine.data_pipeline.preparation.claim import INPUTS, LOCK, OWNER, exclusively, release
from trine.data_pipeline.preparation.prepare import prepare
from trine.data_pipeline.preparation.progress import Progress
from trine.data_pipeline.preparation.splits import SPLITS, holdout_score, split_of
from trine.data_pipeline.shards.manifest import MANIFEST, UNFINISHED, Manifest, load_manifest

VOCABULARY, SHARD_TOKENS, CHUNK_BYTES = 300, 1200, 10_000
"""As in the fixture ``prepared``."""


class Heard(Progress):
    """Keeps what it hears; chunks are (documents, tokens, kept)."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.chunks: list[tuple[int, int, bool]] = []
        self.input_bytes = 0

    def say(self, sentence: str) -> None:
        self.said.append(sentence)

    def begin(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes

    def advance(self, input_bytes: int, documents: int, tokens: int, *, kept: bool) -> None:
        self.input_bytes += input_bytes
        self.chunks.append((documents, tokens, kept))


def run(inputs: Any, output: Path, **changes: Any) -> Manifest:
    arguments = {
        "train_tokenizer": VOCABULARY,
        "validation_fraction": 0.2,
        "shard_tokens": SHARD_TOKENS,
        "chunk_bytes": CHUNK_BYTES,
    }
    return prepare([str(inputs)], output, **arguments | changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_documents_come_out_as_they_went_in(corpus: Path, prepared: Path) -> None:
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json"))
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
    assert contents(prepared).keys() == {*names, *indexes, MANIFEST, INPUTS, "tokenizer.json"}


def test_a_second_preparation_has_the_same_bytes(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    assert run(corpus, tmp_path).fingerprint == load_manifest(prepared).fingerprint
    assert contents(tmp_path) == contents(prepared)


def test_a_finished_preparation_is_returned_at_once(corpus: Path, prepared: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()}
    heard = Heard()
    assert run(f"{corpus}/", prepared, progress=heard) == load_manifest(prepared)
    assert heard.said == [f"{prepared} is prepared already"]
    assert {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"train_tokenizer": 400}, "trained_vocabulary is 300 there and 400 here"),
        ({"validation_fraction": 0.1}, "validation_fraction is 0.2 there and 0.1 here"),
        ({"shard_tokens": 800}, "shard_tokens is 1200 there and 800 here"),
        ({"chunk_bytes": 800}, "chunk_bytes is 10000 there and 800 here"),
        ({"text_field": "body"}, "text_field is text there and body here"),
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


@pytest.mark.parametrize("name", ["01.txt", "deep/02.md", "more.jsonl"])
def test_inputs_that_have_changed_since_need_another_folder(corpus: Path, tmp_path: Path, name: str) -> None:
    inputs, output = shutil.copytree(corpus, tmp_path / "corpus"), tmp_path / "out"
    manifest = run(inputs, output)
    assert run(f"{inputs}//", output) == manifest
    flip(inputs / name, 3)  # of the same size
    with pytest.raises(UsageError) as error:
        run(inputs, output)
    assert str(error.value) == (
        f"{output} was prepared from other input files, or they have changed since ({INPUTS} there tells, by names, "
        "sizes and times of modification); choose another output folder, or delete this one to prepare anew"
    )


def test_times_of_inputs_do_not_enter_the_fingerprint(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    inputs = shutil.copytree(corpus, tmp_path / "corpus")
    one = run(inputs, tmp_path / "one")
    os.utime(inputs / "01.txt")
    other = run(inputs, tmp_path / "other")
    assert one.fingerprint == other.fingerprint
    assert (tmp_path / "one" / INPUTS).read_bytes() != (tmp_path / "other" / INPUTS).read_bytes()
    (tmp_path / "other" / INPUTS).unlink()
    with pytest.raises(UsageError, match="was prepared from other input files"):
        run(inputs, tmp_path / "other")


def stopped_midway(inputs: Path, output: Path, chunks: int, **changes: Any) -> None:
    """A preparation that is interrupted when so many chunks are done."""

    class Interrupting(Heard):
        def advance(self, input_bytes: int, documents: int, tokens: int, *, kept: bool) -> None:
            super().advance(input_bytes, documents, tokens, kept=kept)
            if len(self.chunks) == chunks:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(inputs, output, progress=Interrupting(), **changes)
    assert MANIFEST not in contents(output)


def test_finished_chunks_are_kept(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    stopped_midway(corpus, tmp_path, 3)
    with pytest.raises(UsageError, match="has not finished; run it again"):
        load_manifest(tmp_path)
    before = {path.name: path.stat() for path in tmp_path.iterdir() if path.suffix in (".tar", ".npy", ".json")}
    assert {"train-00000-000.tar", "train-00001-000.tar", "train-00002-000.tar"} <= before.keys()
    # What a kill may leave beside that: a chunk without its record, and temporary files.
    for name in ("train-00003-000.tar", "train-00003-000.idx.npy.0a1b2c3d.tmp", "chunks/00004.json.0a1b2c3d.tmp"):
        (tmp_path / name).touch()
    heard = Heard()
    run(corpus, tmp_path, progress=heard)
    assert [kept for _, _, kept in heard.chunks] == [True] * 3 + [False] * (len(heard.chunks) - 3)
    assert heard.input_bytes == heard.total_bytes
    assert not any(sentence.startswith("training") for sentence in heard.said)
    assert contents(tmp_path) == contents(prepared)
    for name in before.keys() - {UNFINISHED}:
        after = (tmp_path / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before[name].st_ino, before[name].st_mtime_ns)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "train-00001-000.tar").unlink(),
        lambda folder: (folder / "train-00001-000.idx.npy").write_bytes(b"short"),
        lambda folder: flip(folder / "train-00001-000.tar", 700),
        lambda folder: flip(folder / "chunks/00001.json", 20),
        lambda folder: (folder / "chunks/00001.json").unlink(),
    ],
)
def test_a_damaged_chunk_is_made_again(
    corpus: Path, prepared: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    stopped_midway(corpus, tmp_path, 3)
    damage(tmp_path)
    heard = Heard()
    run(corpus, tmp_path, progress=heard)
    assert [kept for _, _, kept in heard.chunks[:4]] == [True, False, True, False]
    assert contents(tmp_path) == contents(prepared)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_another_tokenizer_in_the_folder_is_replaced(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    stopped_midway(corpus, tmp_path, 1)
    (tmp_path / "tokenizer.json").write_text("{}")
    run(corpus, tmp_path)
    assert contents(tmp_path) == contents(prepared)


def test_finished_chunks_are_not_given_up(corpus: Path, tmp_path: Path) -> None:
    inputs, output = shutil.copytree(corpus, tmp_path / "corpus"), tmp_path / "out"
    stopped_midway(inputs, output, 2)
    before = contents(output)
    with pytest.raises(UsageError) as error:
        run(inputs, output, train_tokenizer=400)
    assert str(error.value) == (
        f"{output} holds another, unfinished preparation (trained_vocabulary is 300 there and 400 here); "
        f"repeat its own command to finish it, delete {output}, or choose another folder"
    )
    text = inputs / "01.txt"
    text.write_bytes(text.read_bytes())
    with pytest.raises(UsageError, match="input files that have changed since .* delete .* to begin anew"):
        run(inputs, output)
    (output / UNFINISHED).write_text('{"sources": []}')
    with pytest.raises(UsageError, match="unfinished preparation of another version of trine; delete"):
        run(inputs, output)
    assert contents(output).keys() == before.keys()


def test_what_finished_no_chunk_may_be_corrected_in_place(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    inputs, output = shutil.copytree(corpus, tmp_path / "corpus"), tmp_path / "out"
    (inputs / "00.txt").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"00\.txt is not UTF-8"):
        run(inputs, output, tokenizer=prepared / "tokenizer.json", train_tokenizer=None)
    assert UNFINISHED in contents(output)
    (inputs / "00.txt").unlink()
    run(inputs, output, train_tokenizer=VOCABULARY + 1)
    run(inputs, tmp_path / "clean", train_tokenizer=VOCABULARY + 1)
    assert contents(output) == contents(tmp_path / "clean")


def test_a_kill_between_manifest_and_end_is_tidied_up(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    stopped_midway(corpus, tmp_path, 2)
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    assert run(corpus, tmp_path) == load_manifest(prepared)
    assert contents(tmp_path) == contents(prepared)
    assert not (tmp_path / "chunks").exists()


def test_two_at_a_time_are_refused(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    with exclusively(tmp_path), pytest.raises(UsageError, match="is being prepared by another process; wait"):
        run(corpus, tmp_path)
    run(corpus, tmp_path)
    assert contents(tmp_path) == contents(prepared)


def test_a_lock_on_a_file_that_is_no_longer_there_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the lock and locking it, the one who held it removes it; then another makes it anew."""
    really, path, descriptors = fcntl.flock, tmp_path / LOCK, len(os.listdir("/proc/self/fd"))
    moments = iter([path.unlink, lambda: (path.unlink(), path.touch())])

    def flock(descriptor: int, operation: int) -> None:
        next(moments, lambda: None)()
        really(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusively(tmp_path):
        assert len(os.listdir("/proc/self/fd")) == descriptors + 1
        with pytest.raises(UsageError, match="is being prepared by another process; wait"), exclusively(tmp_path):
            pass
    assert next(moments, None) is None
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lustre answers where it is mounted without them."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("without_locks")
def test_two_at_a_time_are_refused_without_locks_too(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    with exclusively(tmp_path):
        with pytest.raises(UsageError) as error:
            run(corpus, tmp_path)
        # What a kill leaves behind is named as well as the remedy, which works.
        assert re.fullmatch(
            rf"{tmp_path} is being prepared by process {os.getpid()} on \S+; wait for it or, if that has been killed, "
            rf"delete {tmp_path / OWNER}, for this file system has no locks that end with their process",
            str(error.value),
        )
        (tmp_path / OWNER).unlink()
    run(corpus, tmp_path)
    assert contents(tmp_path) == contents(prepared)


@pytest.mark.parametrize("lost", ["train-00001-000.tar", "train-00001-000.idx.npy"])
@pytest.mark.parametrize("how", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_manifest_names_no_shard_that_is_gone(
    corpus: Path, prepared: Path, tmp_path: Path, lost: str, how: Callable[[Path], object]
) -> None:
    class Losing(Progress):
        def finish(self) -> None:
            how(tmp_path / lost)

    with pytest.raises(RunError, match=rf"has lost {lost}, which this preparation had written, perhaps to another"):
        run(corpus, tmp_path, progress=Losing())
    assert MANIFEST not in contents(tmp_path)
    run(corpus, tmp_path)
    assert contents(tmp_path) == contents(prepared)


def test_a_claim_is_given_up_last(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    stopped_midway(corpus, tmp_path, 2)
    (tmp_path / "chunks" / "zz").mkdir()  # ends the removal midway, as a kill does
    with pytest.raises(OSError, match="zz"):
        release(tmp_path)
    assert UNFINISHED in contents(tmp_path)
    (tmp_path / "chunks" / "zz").rmdir()
    run(corpus, tmp_path)
    assert contents(tmp_path) == contents(prepared)


def test_a_tokenizer_that_a_worker_sees_otherwise_is_refused(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    class Exchanging(Progress):
        def begin(self, total_bytes: int) -> None:
            text = (tmp_path / "tokenizer.json").read_text()
            (tmp_path / "tokenizer.json").write_text(text + " ")

    expected = load_manifest(prepared).tokenizer_sha256
    with pytest.raises(RunError, match=rf"tokenizer\.json has the SHA-256 \w{{64}} for .* not {expected} as when"):
        run(corpus, tmp_path, progress=Exchanging())
    assert MANIFEST not in contents(tmp_path)


def test_bpe_dropout_is_left_out(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    random = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    random.model.dropout = 0.2
    random.save(str(tmp_path / "random.json"))
    given = {"tokenizer": tmp_path / "random.json", "train_tokenizer": None}
    manifest = run(corpus, tmp_path / "out", **given)
    assert '"dropout": 0.2' in (tmp_path / "out" / "tokenizer.json").read_text()
    assert manifest.splits == load_manifest(prepared).splits


def test_an_input_that_changes_meanwhile_is_noticed(corpus: Path, tmp_path: Path) -> None:
    inputs, output = shutil.copytree(corpus, tmp_path / "corpus"), tmp_path / "out"

    class Appending(Progress):
        def begin(self, total_bytes: int) -> None:
            with (inputs / "more.jsonl").open("a") as file:
                file.write('{"text": "late"}\n')

    with pytest.raises(RunError, match=r"more\.jsonl has changed while it was prepared"):
        run(inputs, output, progress=Appending())


def test_files_of_other_kinds_are_mentioned_once(corpus: Path, tmp_path: Path) -> None:
    inputs = shutil.copytree(corpus, tmp_path / "corpus")
    for name in ("a.png", "b.png", "c.zip"):
        (inputs / name).touch()
    heard = Heard()
    run(inputs, tmp_path / "out", progress=heard)
    assert [sentence for sentence in heard.said if "left out" in sentence] == ["left out 2 .png, 1 .zip"]


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
    output = tmp_path / "out"
    with pytest.raises(UsageError) as error:
        run(path, output, validation_fraction=0.02)
    assert str(error.value) == (
        "--validation-fraction 0.02 holds out no document of 1: "
        "use --validation-fraction 0 for no validation split, or give more documents"
    )
    # The same folder does for the corrected command.
    assert contents(output) == {}
    with pytest.raises(UsageError, match="no document to train on"):
        run(path, output, validation_fraction=0.999)
    manifest = run(path, output, validation_fraction=0.0)
    assert list(manifest.splits) == ["train"]
    with pytest.raises(UsageError, match="no document to train on"):
        prepare([str(path)], tmp_path / "o", tokenizer=output / "tokenizer.json", validation_fraction=0.999)

    other = tmp_path / "two.txt"
    other.write_text("another document")
    with pytest.raises(UsageError, match=r"no document of 2: use --validation-fraction 0\.\d{4} to hold") as error:
        run(tmp_path, tmp_path / "out2", validation_fraction=0.0001)
    named = float(re.findall(r"fraction (0\.\d{4}) to", str(error.value))[0])
    lowest = min(holdout_score(file.read_text()) for file in (path, other))
    assert lowest < named <= lowest + 1e-4


def test_empty_inputs_are_named(tmp_path: Path, prepared: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UsageError, match="the inputs hold no document, only empty files"):
        run(tmp_path / "empty.txt", tmp_path / "out")
    with pytest.raises(UsageError, match="the inputs hold no document, only empty files"):
        prepare([str(tmp_path / "empty.txt")], tmp_path / "out", tokenizer=prepared / "tokenizer.json")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"train_tokenizer": None}, "either a tokenizer or the size of a vocabulary to train"),
        ({"tokenizer": Path("t.json")}, "either a tokenizer or the size of a vocabulary to train"),
        ({"train_tokenizer": 100}, "vocabulary of 100 tokens cannot hold every byte; ask for 257 at least"),
        ({"validation_fraction": 1.0}, "--validation-fraction 1.0 is not a fraction"),
        ({"validation_fraction": float("nan")}, "--validation-fraction nan is not a fraction"),
        ({"shard_tokens": 0}, "shard_tokens=0 leaves shards empty"),
        ({"text_field": "caf\udce9"}, r"--text-field 'caf\\udce9' is not UTF-8"),
        ({"chunk_bytes": 0}, "chunk_bytes=0 leaves chunks empty"),
        ({"tokenizer": Path("t.json"), "train_tokenizer": None}, "tokenizer t.json cannot be read"),
    ],
)
def test_a_wrong_request_touches_nothing(
    corpus: Path, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        run(corpus, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_an_output_that_no_configuration_could_name_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"caf\\udce9' has a name that is not UTF-8, as configurations are; choose"):
        run(corpus, tmp_path / os.fsdecode(b"caf\xe9"))
    assert contents(tmp_path) == {}


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
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    decoded = [tokenizer.decode(part.tolist()) for part in np.split(tokens, np.flatnonzero(tokens == 0))]
    assert decoded[:-1] == [document.text for document in iter_documents([str(few)])]


def test_a_sentencepiece_model_is_a_tokenizer(corpus: Path, tmp_path: Path) -> None:
    import sentencepiece

    sentences = [document.text.replace("\n", " ") for document in iter_documents([str(corpus)])]
    with (tmp_path / "own.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=file, vocab_size=300, byte_fallback=True, minloglevel=9
        )
    output = tmp_path / "out"
    manifest = run(corpus, output, tokenizer=tmp_path / "own.model", train_tokenizer=None)
    assert (manifest.tokenizer, manifest.vocabulary_size) == ("tokenizer.model", 300)
    assert (output / "tokenizer.model").read_bytes() == (tmp_path / "own.model").read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(output / "tokenizer.model"))
    assert manifest.eos_id == processor.eos_id()
    first = next(d.text for d in iter_documents([str(corpus)]) if split_of(holdout_score(d.text), 0.2) == "train")
    ids = processor.encode(first)
    assert TokenDataset(output, "train", len(ids))[0].tokens.tolist() == [*ids, manifest.eos_id]


def test_preparation_imports_neither_torch_nor_webdataset() -> None:
    # The command line would otherwise wait seconds for torch before it says anything.
    program = "import sys, trine.data_pipeline.preparation.prepare; print({'torch', 'webdataset'} & sys.modules.keys())"
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
    with pytest.raises(UsageError, match="sources is .* there and .*'stdlib/'"):
        run("stdlib/", tmp_path / "out", validation_fraction=0.0)


def test_a_split_that_would_be_empty_is_told_before_any_work(tmp_path: Path, prepared: Path) -> None:
    (tmp_path / "one.txt").write_text("a document of its own")
    progress = Spoken()
    with pytest.raises(UsageError, match="holds out no document of 1"):
        prepare([str(tmp_path / "one.txt")], tmp_path / "out", tokenizer=prepared / "tokenizer.json", progress=progress)
    assert progress.advanced == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == []


class Spoken(Progress):
    """Counts the chunks that were done."""

    advanced = 0

    def advance(self, input_bytes: int, documents: int, tokens: int, *, kept: bool) -> None:
        self.advanced += 1
