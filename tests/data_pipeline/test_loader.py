"""Batches: one global sequence of samples whatever the ranks, and a resume that refuses another one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trine.configs.errors import UsageError
from trine.data_pipeline.dataset import TokenDataset
from trine.data_pipeline.loader import BatchLoader, Order, SampleOrder, SequentialOrder
from trine.data_pipeline.prepare import prepare


@pytest.fixture(scope="module")
def dataset(prepared: Path) -> TokenDataset:
    return TokenDataset(prepared, "train", 32)


def loader(
    dataset: TokenDataset, order: Order | None = None, micro: int = 1, rank: int = 0, size: int = 1
) -> BatchLoader:
    order = order or SampleOrder(len(dataset), 5)
    return BatchLoader(
        dataset, order, micro_batch_size=micro, data_parallel_rank=rank, data_parallel_size=size
    )


def global_batch(dataset: TokenDataset, consumed: int, batch: int, micro: int, size: int) -> list[int]:
    """Sample ids of a step over all ranks, in rank order."""
    loaders = [loader(dataset, micro=micro, rank=rank, size=size) for rank in range(size)]
    return [
        int(index)
        for one in loaders
        for part in one.microbatches(consumed, batch)
        for index in part.sample_ids
    ]


def test_any_layout_gives_the_same_global_sequence(dataset: TokenDataset) -> None:
    batch, steps = 12, 2 * len(dataset) // 12
    sequence = SampleOrder(len(dataset), 5).sample_ids(0, batch * steps).tolist()
    for size, micro in [(1, 1), (1, 12), (2, 3), (3, 4), (4, 1), (12, 1)]:
        seen = [
            index
            for step in range(steps)
            for index in global_batch(dataset, step * batch, batch, micro, size)
        ]
        assert seen == sequence


def test_a_run_resumes_at_another_size_and_batch(dataset: TokenDataset) -> None:
    sequence = SampleOrder(len(dataset), 5).sample_ids(0, 60).tolist()
    before = global_batch(dataset, 0, 24, 3, 4)
    after = [index for step in range(3) for index in global_batch(dataset, 24 + 12 * step, 12, 2, 2)]
    assert before + after == sequence


def test_every_epoch_visits_each_sample_once_in_its_own_order() -> None:
    order = SampleOrder(101, 7)
    epochs = order.sample_ids(0, 303).reshape(3, 101)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(101))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert order.sample_ids(0, 101).tolist() != SampleOrder(101, 8).sample_ids(0, 101).tolist()
    # Entered anywhere, it is the same sequence.
    np.testing.assert_array_equal(order.sample_ids(95, 120), epochs.reshape(-1)[95:215])
    assert order.sample_ids(50, 0).size == 0


def test_sequential_order_cycles_over_the_split() -> None:
    assert SequentialOrder(3).sample_ids(2, 5).tolist() == [2, 0, 1, 2, 0]
    assert SequentialOrder(3).seed is None


def test_batches_hold_inputs_and_the_tokens_that_follow(dataset: TokenDataset) -> None:
    (batch,) = loader(dataset, SequentialOrder(len(dataset)), micro=3).microbatches(1, 3)
    assert batch.sample_ids.tolist() == [1, 2, 3]
    assert batch.tokens.dtype == batch.labels.dtype == batch.document_start.dtype == torch.int64
    assert batch.tokens.is_contiguous()
    assert batch.labels.is_contiguous()
    for row, index in enumerate(batch.sample_ids):
        window = torch.from_numpy(dataset[int(index)].tokens)
        assert torch.equal(batch.tokens[row], window[:-1])
        assert torch.equal(batch.labels[row], window[1:])


def test_batches_say_where_the_document_of_each_token_starts(write_split: Callable[..., Path]) -> None:
    """Documents of 3, 1 and 8 tokens in windows of 4: the last goes on through the second and third window."""
    folder = write_split([[5, 6, 0], [0], [7] * 7 + [0], [8, 0]])
    dataset = TokenDataset(folder, "train", 4)
    (batch,) = loader(dataset, SequentialOrder(len(dataset)), micro=3).microbatches(0, 3)
    assert batch.document_start.tolist() == [[0, 0, 0, 3], [0, 0, 0, 0], [0, 0, 0, 0]]
    (batch,) = loader(TokenDataset(folder, "train", 6), SequentialOrder(2), micro=2).microbatches(0, 2)
    assert batch.document_start.tolist() == [[0, 0, 0, 3, 4, 4], [0, 0, 0, 0, 0, 0]]


def test_reading_leaves_no_trace(dataset: TokenDataset) -> None:
    one = loader(dataset, micro=2)
    first = [batch.tokens for batch in one.microbatches(0, 8)]
    list(one.microbatches(40, 8))
    again = [batch.tokens for batch in one.microbatches(0, 8)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_batches_that_do_not_divide_are_named(dataset: TokenDataset) -> None:
    for batch in (10, 0, -8):
        with pytest.raises(
            UsageError, match=rf"global_batch_size={batch} is not a multiple of 8 .*2 x .* size 4\)"
        ):
            loader(dataset, micro=2, size=4).microbatches(0, batch)
    with pytest.raises(ValueError, match="rank 4 is outside the data-parallel size 4"):
        loader(dataset, rank=4, size=4)


def test_state_is_small_json_and_accepted_again(dataset: TokenDataset) -> None:
    state = loader(dataset).state(123)
    assert state == {
        "format": 1,
        "fingerprint": dataset.fingerprint,
        "seed": 5,
        "sequence_length": 32,
        "consumed_samples": 123,
    }
    restored = json.loads(json.dumps(state))
    loader(dataset, micro=2, rank=1, size=4).check_state(restored)
    assert len(json.dumps(state)) < 1024


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"seed": 6}, "was made with seed 6 and this run has 5"),
        ({"sequence_length": 64}, "was made with sequence length 64 and this run has 32"),
        ({"fingerprint": "ab"}, "was made with data of the fingerprint ab and this run has [0-9a-f]{64}"),
        ({"format": 2}, "was made with data position format 2 and this run has 1"),
    ],
)
def test_another_sequence_is_refused(dataset: TokenDataset, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        loader(dataset).check_state(loader(dataset).state(3) | change)


def test_half_a_state_is_refused(dataset: TokenDataset) -> None:
    with pytest.raises(UsageError, match="lacks consumed_samples and format and seed and sequence_length"):
        loader(dataset).check_state({"fingerprint": dataset.fingerprint})


def test_other_data_is_refused(dataset: TokenDataset, corpus: Path, tmp_path: Path) -> None:
    prepare([str(corpus)], tmp_path, train_tokenizer=299, validation_fraction=0.2)
    other = TokenDataset(tmp_path, "train", 32)
    with pytest.raises(
        UsageError, match=f"fingerprint {dataset.fingerprint} and this run has {other.fingerprint}"
    ):
        loader(other).check_state(loader(dataset).state(3))
