"""Exchanges between the ranks that share a sequence, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trine.configs.stack import SequenceOrder
from trine.parallel.context import SequenceShare

ORDERS: tuple[SequenceOrder, ...] = ("contiguous", "zigzag")


@given(size=st.integers(1, 5), chunk=st.integers(1, 4), order=st.sampled_from(ORDERS))
def test_every_token_has_one_holder(size: int, chunk: int, order: SequenceOrder) -> None:
    length = 2 * size * chunk
    shares = [SequenceShare(length, size, rank, order) for rank in range(size)]
    positions = torch.cat([share.positions for share in shares])
    assert sorted(positions.tolist()) == list(range(length))
    whole = torch.randn(3, length)
    for share in shares:
        assert torch.equal(share.take(whole, 1), whole[:, share.positions])
        assert torch.equal(torch.cat(share.cut(share.take(whole, 1), 1), 1), whole[:, share.positions])


@given(size=st.integers(2, 5), chunk=st.integers(1, 4))
def test_zigzag_gives_every_rank_as_many_visible_keys(size: int, chunk: int) -> None:
    shares = [SequenceShare(2 * size * chunk, size, rank, "zigzag") for rank in range(size)]
    assert len({int((share.positions + 1).sum()) for share in shares}) == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_exchanges(ranks: Any, order: SequenceOrder, size: int) -> None:
    """Each rank compares what it gets, and the gradient it gets back, with the whole sequence. Exact: sums of small
    integers."""
    ranks.run("exchanges:check_exchanges", size, order=order)
