"""A trillion tokens: what does not depend on contents stays small and touches no shard. Times are for benchmarks."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from trine.configs.errors import RunError
from trine.data_pipeline.dataset import TokenDataset
from trine.data_pipeline.order import SampleOrder
from trine.data_pipeline.shards.manifest import Manifest, Request, ShardRecord, write_manifest
from trine.data_pipeline.shards.reader import Damage

SHARDS = 7_451
SHARD_TOKENS = 1 << 27
SEQUENCE_LENGTH = 4096
MIB = 1 << 20


@pytest.fixture(scope="module")
def trillion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the manifest of 2 TB of shards, and none of them."""
    folder = tmp_path_factory.mktemp("trillion")
    records = tuple(
        ShardRecord(
            name=f"train-{number:05d}-000.tar",
            bytes=2 * SHARD_TOKENS + 2 * MIB,
            tokens=SHARD_TOKENS,
            documents=SHARD_TOKENS // 700,
            sha256=f"{number:064x}",
            index_sha256=f"{number + SHARDS:064x}",
        )
        for number in range(SHARDS)
    )
    request = Request(
        sources=("made",),
        source_files=1,
        source_bytes=1,
        tokenizer_sha256=None,
        trained_vocabulary=65_536,
        text_field="text",
        validation_fraction=0.0,
        chunk_bytes=1 << 30,
        shard_tokens=SHARD_TOKENS,
    )
    manifest = Manifest(
        dtype="uint16",
        vocabulary_size=65_536,
        eos_id=0,
        tokenizer_sha256="0" * 64,
        request=request,
        splits={"train": records},
    )
    write_manifest(folder, manifest)
    return folder


def test_a_trillion_tokens_open_without_touching_a_shard(trillion: Path) -> None:
    tracemalloc.start()
    dataset = TokenDataset(trillion, "train", SEQUENCE_LENGTH)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert dataset.manifest.tokens("train") == SHARDS * SHARD_TOKENS > 10**12
    assert len(dataset) == (SHARDS * SHARD_TOKENS - 1) // SEQUENCE_LENGTH
    # A few hundred objects' worth of bytes for each shard; the peak holds the manifest three times, parsed and as text.
    assert kept < 32 * MIB
    assert peak < 128 * MIB


def test_every_window_is_found(trillion: Path) -> None:
    dataset = TokenDataset(trillion, "train", SEQUENCE_LENGTH)
    per_shard = SHARD_TOKENS // SEQUENCE_LENGTH
    for window, shard in ((0, 0), (per_shard - 1, 0), (per_shard, 1), (len(dataset) - 1, SHARDS - 1)):
        complaint = rf"train-{shard:05d}-000\.tar cannot be read \(No such file or directory\); restore it"
        with pytest.raises(Damage, match=complaint):
            dataset[window]


def test_the_order_at_step_100_000_needs_no_table(trillion: Path) -> None:
    batch = 512
    order = SampleOrder(len(TokenDataset(trillion, "train", SEQUENCE_LENGTH)), 1234)
    tracemalloc.start()
    ids = order.sample_ids(100_000 * batch, batch)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert ids.shape == (batch,)
    assert np.unique(ids).size == batch
    assert peak < MIB  # a table would take 2 GB


def test_missing_files_are_counted_by_one_listing(trillion: Path) -> None:
    with pytest.raises(
        RunError,
        match=rf"train-00000-000\.tar is missing \({2 * SHARDS} of the {2 * SHARDS} files of the split train are wrong\)",
    ):
        TokenDataset(trillion, "train", SEQUENCE_LENGTH).check_files()
