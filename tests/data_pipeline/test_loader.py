"""Batches: one global sequence of samples whatever the ranks, cut into sequences without losing a label."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_folder import write_folder

from trine.configs.ramps import StepShape
from trine.data_pipeline.dataset import TokenDataset
from trine.data_pipeline.loader import Batch, BatchLoader, DamagedSamples
from trine.data_pipeline.mixture import Mixture, SampleId, Source
from trine.data_pipeline.order import Order, SampleOrder, SequentialOrder
from trine.data_pipeline.shards.manifest import load_manifest

WHOLE = StepShape(samples=12, sequence_length=32, pieces=1)


@pytest.fixture(scope="module")
def dataset(prepared: Path) -> TokenDataset:
    return TokenDataset(prepared, "train", 32)


@pytest.fixture(scope="module")
def mixture(dataset: TokenDataset, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Two sources, of which the second is small and read in many epochs."""
    folder = tmp_path_factory.mktemp("small")
    write_folder(folder, {"train": [[7 * 32 + 1]]}, member_tokens=50, shard_tokens=100)
    small = TokenDataset(folder, "train", 32)
    return Mixture(
        [
            Source("large", dataset, 2.0, SampleOrder(len(dataset), 5)),
            Source("small", small, 1.0, SampleOrder(len(small), 5)),
        ]
    )


def one_source(dataset: TokenDataset, order: Order | None = None) -> Mixture:
    return Mixture([Source("one", dataset, 1.0, order or SequentialOrder(len(dataset)))])


def loader(mixture: Mixture, micro: int = 1, rank: int = 0, size: int = 1) -> BatchLoader:
    return BatchLoader(mixture, micro_batch_size=micro, data_parallel_rank=rank, data_parallel_size=size)


def global_batch(mixture: Mixture, consumed: int, batch: int, micro: int, size: int) -> list[SampleId]:
    """Samples of a step over all ranks, in rank order."""
    loaders = [loader(mixture, micro, rank, size) for rank in range(size)]
    parts = [part for one in loaders for part in one.plan(consumed, batch)]
    assert {len(part) for part in parts} == {micro}
    return [sample for part in parts for sample in part]


def test_any_layout_gives_the_same_global_sequence(mixture: Mixture) -> None:
    batch, steps = 12, 10
    sequence = mixture.sample_ids(0, batch * steps)
    for size, micro in [(1, 1), (1, 12), (2, 3), (3, 4), (4, 1), (12, 1)]:
        seen = [global_batch(mixture, step * batch, batch, micro, size) for step in range(steps)]
        assert list(itertools.chain.from_iterable(seen)) == sequence


def test_a_run_resumes_at_another_size_and_batch(mixture: Mixture) -> None:
    before = global_batch(mixture, 0, 24, 3, 4)
    after = [sample for step in range(3) for sample in global_batch(mixture, 24 + 12 * step, 12, 2, 2)]
    assert before + after == mixture.sample_ids(0, 60)


def test_batches_that_do_not_divide_are_named(mixture: Mixture) -> None:
    for batch in (10, 12, 20):
        with pytest.raises(ValueError, match=f"a batch of {batch} is no multiple of 2 x 4 samples"):
            loader(mixture, micro=2, size=4).plan(0, batch)
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=f"rank {rank} is outside the data-parallel size 4"):
            loader(mixture, rank=rank, size=4)


def test_batches_hold_inputs_and_the_tokens_that_follow(mixture: Mixture) -> None:
    one = loader(mixture, micro=6)
    for samples in one.plan(3, 12):
        batch = one.read(samples, WHOLE)
        assert batch.sample_ids == samples
        for tensor in (batch.tokens, batch.labels, batch.document_start):
            assert tensor.dtype == torch.int64
            assert tensor.shape == (6, 32)
            assert tensor.is_contiguous()
        for row, sample in enumerate(samples):
            window = torch.from_numpy(mixture.sources[sample.source].dataset[sample.window].tokens)
            assert torch.equal(batch.tokens[row], window[:-1])
            assert torch.equal(batch.labels[row], window[1:])


@pytest.mark.parametrize("pieces", [1, 2, 4, 32])
def test_pieces_laid_together_are_the_windows(mixture: Mixture, pieces: int) -> None:
    one, length = loader(mixture, micro=3), 32 // pieces
    (samples,) = one.plan(7, 3)
    batch = one.read(samples, StepShape(3, length, pieces))
    assert batch.tokens.shape == batch.labels.shape == batch.document_start.shape == (3 * pieces, length)
    assert batch.tokens.is_contiguous()
    assert batch.labels.is_contiguous()
    for number, sample in enumerate(samples):
        rows = slice(number * pieces, (number + 1) * pieces)
        window = mixture.sources[sample.source].dataset[sample.window].tokens
        np.testing.assert_array_equal(batch.tokens[rows].reshape(-1), window[:-1])
        np.testing.assert_array_equal(batch.labels[rows].reshape(-1), window[1:])


def read_alone(folder: Path, length: int, index: int, pieces: int) -> Batch:
    mixture = one_source(TokenDataset(folder, "train", length))
    return loader(mixture).read((SampleId(0, index),), StepShape(1, length // pieces, pieces))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 15), min_size=4, max_size=12),
    pieces=st.integers(1, 4),
    piece_length=st.integers(1, 5),
)
def test_document_starts_against_brute_force(
    write_split: Callable[..., Path], lengths: list[int], pieces: int, piece_length: int
) -> None:
    """Every token looks back for the start of its document, and stops at the start of its sequence."""
    length = pieces * piece_length
    if sum(lengths) <= length:
        return
    folder = write_split([[7] * (count - 1) + [0] for count in lengths], member_tokens=9, shard_tokens=30)
    begins = set(np.cumsum([0, *lengths]).tolist())
    for index in range((sum(lengths) - 1) // length):
        expected = []
        for sequence in range(pieces):
            first = index * length + sequence * piece_length
            expected.append(
                [
                    next((back for back in range(position, -1, -1) if first + back in begins), 0)
                    for position in range(piece_length)
                ]
            )
        assert read_alone(folder, length, index, pieces).document_start.tolist() == expected


def test_batches_say_where_the_document_of_each_token_starts(write_split: Callable[..., Path]) -> None:
    """Documents of 3, 1 and 8 tokens."""
    folder = write_split([[5, 6, 0], [0], [7] * 7 + [0], [8, 0]])
    assert read_alone(folder, 4, 0, 1).document_start.tolist() == [[0, 0, 0, 3]]
    assert read_alone(folder, 4, 1, 1).document_start.tolist() == [[0, 0, 0, 0]]
    assert read_alone(folder, 12, 0, 1).document_start.tolist() == [[0, 0, 0, 3, *[4] * 8]]
    assert read_alone(folder, 12, 0, 3).document_start.tolist() == [[0, 0, 0, 3], [0] * 4, [0] * 4]
    assert read_alone(folder, 12, 0, 2).document_start.tolist() == [[0, 0, 0, 3, 4, 4], [0] * 6]


def test_reading_leaves_no_trace(mixture: Mixture) -> None:
    one = loader(mixture, micro=2)
    first = [one.read(samples, WHOLE).tokens for samples in one.plan(0, 8)]
    for samples in one.plan(40, 8):
        one.read(samples, WHOLE)
    again = [one.read(samples, WHOLE).tokens for samples in one.plan(0, 8)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_substitute_is_read_in_the_place_of_its_sample(mixture: Mixture) -> None:
    one = loader(mixture, micro=4)
    (samples,) = one.plan(0, 4)
    table = {samples[2]: SampleId(1, 6), SampleId(1, 6): SampleId(1, 0)}
    plain, mended = one.read(samples, WHOLE), one.read(samples, WHOLE, table)
    assert mended.sample_ids == samples
    assert torch.equal(mended.tokens[[0, 1, 3]], plain.tokens[[0, 1, 3]])
    # A substitute is not replaced in its turn: it is what was drawn for the sample.
    np.testing.assert_array_equal(mended.tokens[2], mixture.sources[1].dataset[6].tokens[:-1])
    np.testing.assert_array_equal(mended.labels[2], mixture.sources[1].dataset[6].tokens[1:])


def test_all_damage_of_a_microbatch_is_told_at_once(tmp_path: Path) -> None:
    """Members of 8 tokens hold two windows of 4; the second member is damaged, and windows 1 to 3 touch it."""
    write_folder(tmp_path, {"train": [[8] * 8]}, member_tokens=8, shard_tokens=1000)
    (record,) = load_manifest(tmp_path).splits["train"]
    with (tmp_path / record.name).open("r+b") as file:
        tar = file.read()
        # A member of tokens has a header and a payload of 512 bytes each, and so have the lengths that follow it.
        assert tar[2048 : 2048 + 12] == b"00000-000001"
        file.seek(2048 + 512)
        file.write(bytes([tar[2048 + 512] ^ 1]))
    one = loader(one_source(TokenDataset(tmp_path, "train", 4)))
    samples = tuple(SampleId(0, window) for window in (0, 2, 1, 3, 4, 5))
    shape = StepShape(6, 4, 1)
    with pytest.raises(DamagedSamples) as raised:
        one.read(samples, shape)
    found = raised.value.found
    assert list(found) == [SampleId(0, window) for window in (2, 1, 3)]
    assert all("00000-000001.tok is damaged" in reason for reason in found.values())
    # What is wrong with a substitute counts for the sample in whose place it was read.
    with pytest.raises(DamagedSamples) as raised:
        one.read(samples[:2], shape, {SampleId(0, 0): SampleId(0, 3), SampleId(0, 2): SampleId(0, 9)})
    assert list(raised.value.found) == [SampleId(0, 0)]
    mended = one.read(samples, shape, {SampleId(0, n): SampleId(0, 10 + n) for n in (1, 2, 3)})
    assert mended.sample_ids == samples
