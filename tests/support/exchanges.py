"""A job for the rank pool: every exchange of context parallelism against the whole sequence."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from trine.configs.stack import SequenceOrder
from trine.parallel.context import ContextParallel, SequenceShare

CHUNK = 5


def check_exchanges(rank: int, world_size: int, *, order: SequenceOrder) -> None:
    """Raises AssertionError where an exchange or its gradient is wrong."""
    share = SequenceShare(2 * world_size * CHUNK, world_size, rank, order)
    context = ContextParallel(share, dist.group.WORLD)
    whole = _integers(share.length, seed=0)
    _check_gather(context, whole)
    # Fewer rows than a chunk, exactly one, more than one, more than there are.
    for rows in (0, 1, CHUNK, CHUNK + 2, 3 * CHUNK, share.length):
        _check_halo(context, whole, rows)
    _check_heads(context, whole)


def _check_gather(context: ContextParallel, whole: Tensor) -> None:
    share = context.share
    mine = share.take(whole, 0).requires_grad_()
    gathered = context.gather(mine)
    assert torch.equal(gathered, whole)
    weights = [_integers(share.length, seed=1 + rank) for rank in range(share.size)]
    (gathered * weights[share.rank]).sum().backward()
    assert mine.grad is not None
    assert torch.equal(mine.grad, share.take(torch.stack(weights).sum(0), 0))


def _check_halo(context: ContextParallel, whole: Tensor, rows: int) -> None:
    share = context.share
    mine = share.take(whole, 0).requires_grad_()
    halos = context.halo(mine, rows)
    for span, halo in zip(share.spans, halos, strict=True):
        assert torch.equal(halo, whole[max(0, span.start - rows) : span.start]), (rows, span)
    # Each chunk's halo with a weight of its own: the gradient counts who read what.
    torch.stack([(1 + number) * halo.sum() for number, halo in zip(share.chunks, halos, strict=True)]).sum().backward()
    readers = torch.zeros(share.length)
    for rank in range(share.size):
        for number in share.chunks_of(rank):
            start = number * share.chunk_length
            readers[max(0, start - rows) : start] += 1 + number
    assert mine.grad is not None
    assert torch.equal(mine.grad, share.take(readers, 0)[:, None, None].expand_as(mine)), rows


def _check_heads(context: ContextParallel, whole: Tensor) -> None:
    share = context.share
    grouped = torch.unflatten(whole, -1, (share.size, -1))
    mine = share.take(grouped, 0).requires_grad_()
    scattered = context.scatter_heads(mine)
    assert torch.equal(scattered, grouped[:, :, share.rank])
    back = context.gather_heads(scattered)
    assert torch.equal(back, mine)
    weight = share.take(grouped, 0) + 1
    (back * weight).sum().backward()
    assert mine.grad is not None
    assert torch.equal(mine.grad, weight)


def _integers(length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, (length, 2, 12), generator=generator).float()
