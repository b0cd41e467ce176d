"""A small generated corpus and its preparation, shared by the tests of the data pipeline."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_folder import made_request

from trine.data_pipeline.preparation.prepare import prepare
from trine.data_pipeline.shards.manifest import DtypeName, Manifest, token_dtype, write_manifest
from trine.data_pipeline.shards.writer import ShardWriter

VOCABULARY = 300
SHARD_TOKENS = 1200
"""Most documents are shorter and the longest are longer: shards hold several, and some are split."""
CHUNK_BYTES = 10_000
"""Some chunks hold several files, and the JSON Lines are cut."""

_WORDS = [
    "retention",
    "differential",
    "yoco",
    "\u00fcber",
    "\u4e16\u754c",
    "\n",
    "  ",
    "42",
    "<|endoftext|>",
    "x",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 40 documents of 1 to 900 words in text files and JSON Lines, and one empty file."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = random.Random(0)
    texts = [
        f"document {n} " + " ".join(generator.choices(_WORDS, k=generator.choice([1, 20, 60, 900])))
        for n in range(40)
    ]
    (folder / "deep").mkdir()
    for n, text in enumerate(texts[:30]):
        name = f"{n:02d}.txt" if n % 2 else f"deep/{n:02d}.md"
        (folder / name).write_bytes(text.encode("utf-8"))
    (folder / "empty.txt").touch()
    lines = [json.dumps({"text": text}) for text in texts[30:]]
    (folder / "more.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared corpus: many shards in both splits. Tests that damage it copy it first."""
    output = tmp_path_factory.mktemp("prepared")
    prepare(
        [str(corpus)],
        output,
        train_tokenizer=VOCABULARY,
        validation_fraction=0.2,
        chunk_bytes=CHUNK_BYTES,
        shard_tokens=SHARD_TOKENS,
    )
    return output


@pytest.fixture
def write_split(tmp_path: Path) -> Callable[..., Path]:
    """Write documents given as token ids to a folder of prepared data, in shards of given sizes."""

    def write(documents: list[list[int]], dtype: DtypeName = "uint16", **sizes: int) -> Path:
        with ShardWriter(tmp_path, "train", **sizes) as writer:
            for document in documents:
                writer.add(np.array(document, token_dtype(dtype)))
            records = writer.finish()
        manifest = Manifest(
            dtype=dtype,
            vocabulary_size=VOCABULARY if dtype == "uint16" else 100_000,
            eos_id=0,
            tokenizer_sha256="0" * 64,
            request=made_request(0),
            splits={"train": tuple(records)},
        )
        write_manifest(tmp_path, manifest)
        return tmp_path

    return write
