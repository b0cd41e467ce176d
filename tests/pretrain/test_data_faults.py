"""What `trine data verify` and a run say of prepared data that are not what they were: the table of docs/data.md."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from training import config_of

from trine.configs.errors import UsageError
from trine.data_pipeline.preparation.prepare import prepare
from trine.data_pipeline.shards.manifest import MANIFEST, UNFINISHED, load_manifest
from trine.data_pipeline.shards.member_index import INDEX_SUFFIX
from trine.data_pipeline.shards.verify import verify
from trine.launch.cli import main
from trine.launch.pool import RankPool

pytestmark = pytest.mark.timeout(120)

TRAINS = "finished"
"""What a run does that the fault does not concern: it reads payloads and indexes alone."""


def shard(folder: Path, number: int = 0) -> Path:
    return folder / load_manifest(folder).splits["train"][number].name


def index(folder: Path) -> Path:
    path = shard(folder)
    return path.with_name(path.name.removesuffix(".tar") + INDEX_SUFFIX)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def swap(first: Path, second: Path) -> None:
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


class Fault(NamedTuple):
    inject: Callable[[Path], object]
    verify: str
    """Part of the first line of ``verify``."""
    run: str
    """Part of what a run says."""


FAULTS = {
    "a flipped byte of the tokens": Fault(
        lambda folder: flip(shard(folder), 600),
        "bytes 512-",
        "member 00000-000000.tok is damaged: expected crc32",
    ),
    "a flipped byte of the document lengths": Fault(
        lambda folder: flip(shard(folder), lengths_offset(folder)),
        "the document lengths in 00000-000000.len do not have their checksum",
        "member 00000-000000.len is damaged: expected crc32",
    ),
    "a flipped byte of a tar header": Fault(lambda folder: flip(shard(folder), 3), "bytes 0-511", TRAINS),
    "a flipped byte of the index": Fault(
        lambda folder: flip(index(folder), 200), ".idx.npy, bytes 200-200: it is damaged", "is damaged: its sha256 is"
    ),
    "a shard that is cut": Fault(
        lambda folder: cut(shard(folder), 700), "it is cut short: it has 700 of", "has 700 bytes and the manifest says"
    ),
    "a shard with bytes behind its end": Fault(
        lambda folder: shard(folder).write_bytes(shard(folder).read_bytes() + b"more"),
        "it has 4 bytes behind its end",
        "bytes and the manifest says",
    ),
    "a missing shard": Fault(lambda folder: shard(folder).unlink(), "is missing", "is missing"),
    "a missing index": Fault(lambda folder: index(folder).unlink(), "is missing", "is missing"),
    "two shards that changed places": Fault(
        lambda folder: swap(shard(folder, 0), shard(folder, 1)), "train-00000-000.tar", "train-00000-000.tar"
    ),
    "an edited manifest": Fault(
        lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"eos_id": 0', '"eos_id": 1')),
        "its eos_id is 1, and that of the tokenizer is 0",
        TRAINS,
    ),
    "a cut manifest": Fault(
        lambda folder: cut(folder / MANIFEST, 300), "index.json is damaged: it is not JSON", "is damaged: it is not JSON"
    ),
    "a foreign tokenizer in the folder": Fault(
        lambda folder: (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n"),
        "tokenizer.json: it is not the tokenizer that made these tokens",
        TRAINS,
    ),
    "a preparation that has not finished": Fault(
        lambda folder: (folder / MANIFEST).rename(folder / UNFINISHED),
        "has not finished",
        "has not finished; run it again to complete it",
    ),
}


def lengths_offset(folder: Path) -> int:
    """Where the first ``.len`` payload of the first training shard lies."""
    import tarfile

    with tarfile.open(shard(folder)) as tar:
        return next(member.offset_data for member in tar if member.name.endswith(".len"))


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared sentences in several shards, some with several documents."""
    output = tmp_path_factory.mktemp("faults") / "tokens"
    corpus = output.with_name("corpus.txt")
    corpus.mkdir()
    for number in range(60):
        (corpus / f"{number}.txt").write_text(f"shard {number} keeps its tokens " * (number % 7 + 1))
    prepare([str(corpus)], output, tokenizer=data / "tokenizer.json", validation_fraction=0.2, shard_tokens=600)
    assert main(["data", "verify", str(output)]) == 0
    return output


@pytest.fixture
def run_on(ranks: RankPool, tmp_path: Path) -> Callable[..., str]:
    """What a run of two steps that reads every sample says."""

    def run(place: str, **data: object) -> str:
        config = config_of(
            [{"mixer": "gated_retention", "layers": 1, "heads": 2}],
            model={"vocabulary_size": None},
            train={"steps": 2, "global_batch_size": 40, "sequence_length": 24, "document_masking": True},
            data={"directory": place, **data},
            evaluation={"interval": 0},
            run={"directory": str(tmp_path / "run")},
        )
        raw = config.model_dump(mode="json", exclude_none=True)
        return str(ranks.run("running:refused", 1, config=raw)[0])

    return run


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_answered(name: str, folder: Path, tmp_path: Path, run_on: Callable[..., str]) -> None:
    fault, copy = FAULTS[name], tmp_path / "tokens"
    shutil.copytree(folder, copy)
    fault.inject(copy)
    said = run_on(str(copy))
    assert fault.run in said
    assert "\n" not in said
    try:
        problems = [str(problem) for problem in verify(copy) if not problem.is_warning]
    except UsageError as error:
        problems = [str(error)]
    assert fault.verify in problems[0]


def test_what_would_run_a_command_is_never_opened(tmp_path: Path, run_on: Callable[..., str]) -> None:
    said = run_on(f"pipe:touch {tmp_path / 'ran'}; cat x")
    assert "would run a command, and data are never read through one" in said
    assert not (tmp_path / "ran").exists()
    assert "is no place that data are read from" in run_on("ftp://host/data")


def test_a_source_of_another_tokenizer_is_refused(folder: Path, tmp_path: Path, run_on: Callable[..., str]) -> None:
    corpus = tmp_path / "other.txt"
    corpus.write_text("other words for another vocabulary")
    prepare([str(corpus)], tmp_path / "other", train_tokenizer=270, validation_fraction=0.0)
    mixed = [{"directory": str(place), "weight": 1} for place in (folder, tmp_path / "other")]
    said = run_on(None, sources=mixed)  # type: ignore[arg-type]
    assert f"{tmp_path / 'other'} was prepared with another tokenizer" in said
    assert f"--tokenizer {folder}/tokenizer.json" in said
