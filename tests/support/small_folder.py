"""A small folder of prepared data, made of token ids directly: several chunks, shards and members in each split."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trine.data_pipeline.corpus.tokenizer import tokenizer_sha256, train_byte_level_bpe
from trine.data_pipeline.durable import write_durably
from trine.data_pipeline.shards.manifest import TOKENIZER, Manifest, Request, ShardRecord, token_dtype, write_manifest
from trine.data_pipeline.shards.writer import ShardWriter

VOCABULARY = 257
END = 0
LENGTHS = {
    "train": [[3, 25, 1, 2, 10, 3], [7, 1, 1, 40, 16], [12]],
    "validation": [[5, 9], [31, 2]],
}
"""Tokens of each document of each chunk. With members of 10 tokens and shards of 20, some documents lie in several
members and shards."""


def write_folder(
    folder: Path,
    lengths: dict[str, list[list[int]]] = LENGTHS,
    *,
    seed: int = 0,
    beyond: int | None = None,
    vocabulary: int = VOCABULARY,
    shard_tokens: int = 20,
    member_tokens: int = 10,
) -> Manifest:
    """Prepare documents of random tokens of those lengths; ``beyond`` is put in place of the 5th token of the first
    document of at least 5."""
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / TOKENIZER, train_byte_level_bpe(["text"], VOCABULARY).to_str().encode())
    dtype = "uint16" if vocabulary <= 1 << 16 else "uint32"
    generator = np.random.default_rng(seed)
    splits: dict[str, tuple[ShardRecord, ...]] = {}
    for split, chunks in lengths.items():
        records: list[ShardRecord] = []
        for number, documents in enumerate(chunks):
            with ShardWriter(folder, split, number, shard_tokens=shard_tokens, member_tokens=member_tokens) as writer:
                for length in documents:
                    ids = generator.integers(1, VOCABULARY, length).astype(token_dtype(dtype))
                    ids[-1] = END
                    if beyond is not None and length >= 5:
                        ids[4], beyond = beyond, None
                    writer.add(ids)
                records += writer.finish()
        splits[split] = tuple(records)
    manifest = Manifest(
        dtype=dtype,
        vocabulary_size=vocabulary,
        eos_id=END,
        tokenizer_sha256=tokenizer_sha256(folder / TOKENIZER),
        request=made_request(sum(map(len, lengths.values()))),
        splits=splits,
    )
    write_manifest(folder, manifest)
    return manifest


def made_request(chunks: int) -> Request:
    """A request that no preparation has met."""
    return Request(
        sources=("made",),
        source_files=chunks,
        source_bytes=1,
        tokenizer_sha256=None,
        trained_vocabulary=VOCABULARY,
        text_field="text",
        validation_fraction=0.0,
        chunk_bytes=1,
        shard_tokens=20,
    )
