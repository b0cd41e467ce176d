"""What a run reads: microbatches of the prepared data, with documents where the run keeps them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training import config_of

from trine.data_pipeline.dataset import TokenDataset
from trine.launch.pool import RankPool

pytestmark = pytest.mark.timeout(120)

LENGTH = 20


def read(ranks: RankPool, data: Path, *, masking: bool) -> list[list[tuple[Any, ...]]]:
    train = {"sequence_length": LENGTH, "document_masking": masking}
    stack = [{"mixer": "gated_retention", "layers": 1, "heads": 2}]
    config = config_of(stack, train=train, data={"directory": str(data)}, evaluation={"interval": 0})
    raw = config.model_dump(mode="json", exclude_none=True)
    return ranks.run("reading:prepared", 2, config=raw, consumed=8)


def test_document_starts_are_read_where_they_mask(ranks: RankPool, data: Path) -> None:
    dataset = TokenDataset(data, "train", LENGTH)
    by_tokens = {tuple(dataset[g].tokens[:-1]): dataset[g].document_start_per_token() for g in range(len(dataset))}
    masked = read(ranks, data, masking=True)
    assert [len(rank) for rank in masked] == [2, 2]
    for tokens, labels, starts in (microbatch for rank in masked for microbatch in rank):
        assert tokens.shape == labels.shape == starts.shape == (2, LENGTH)
        assert torch.equal(tokens[:, 1:], labels[:, :-1])
        for row, start in zip(tokens, starts, strict=True):
            assert start.tolist() == by_tokens[tuple(row.tolist())].tolist()
    plain = read(ranks, data, masking=False)
    assert all(starts is None for rank in plain for _, _, starts in rank)
    for rank, same in zip(plain, masked, strict=True):
        assert all(torch.equal(a[0], b[0]) for a, b in zip(rank, same, strict=True))


def test_context_ranks_read_the_same_and_data_ranks_share(ranks: RankPool, data: Path) -> None:
    """Of four ranks, two context times two data, the former read whole sequences that are equal; validation too is
    read with its documents."""
    train = {"sequence_length": LENGTH, "document_masking": True}
    stack = [{"mixer": "gated_retention", "layers": 1, "heads": 2}]
    config = config_of(
        stack, train=train, data={"directory": str(data)}, evaluation={"interval": 1, "batches": 1}, parallel={"context": 2}
    )
    raw = config.model_dump(mode="json", exclude_none=True)
    found = ranks.run("reading:prepared", 4, config=raw, consumed=8)
    assert [len(rank) for rank in found] == [2 + 2] * 4
    for one, other in ((0, 1), (2, 3)):
        for ours, theirs in zip(found[one], found[other], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not any(torch.equal(a[0], b[0]) for a in found[0] for b in found[2])
    assert all(starts is not None for rank in found for _, _, starts in rank)
