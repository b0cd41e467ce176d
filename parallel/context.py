"""Context parallelism: which tokens of each sequence this rank holds, and how it reaches those of the others.

A sequence of S tokens is cut into equal chunks. In ``contiguous`` order rank r of R holds chunk r; in ``zigzag`` order
it holds chunks r and 2R - 1 - r of 2R, one after the other, so that under a causal mask every rank has the same work.

Every exchange here is differentiable, its backward pass being the transposed exchange. An exchange must take part in
what every rank of the group computes, if only with weight zero: the backward pass of a rank whose output does not
depend on it would never reach the collective for which the others wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain
from typing import Literal, NamedTuple

import torch
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import ProcessGroup

from ..configs.stack import SequenceOrder


@dataclass(frozen=True)
class SequenceShare:
    """The tokens of a sequence of ``length`` that ``rank`` of ``size`` ranks holds.

    ``length`` must be a multiple of ``size`` (``contiguous``) or of 2 * ``size`` (``zigzag``).
    """

    length: int
    size: int = 1
    rank: int = 0
    order: SequenceOrder = "contiguous"

    @property
    def chunks_per_rank(self) -> int:
        """Chunks that each rank holds."""
        return 2 if self.size > 1 and self.order == "zigzag" else 1

    @property
    def local_length(self) -> int:
        """Tokens that each rank holds."""
        return self.length // self.size

    @property
    def chunk_length(self) -> int:
        """Tokens of each chunk."""
        return self.local_length // self.chunks_per_rank

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """Numbers, in the order of the sequence, of the chunks that ``rank`` holds."""
        return (rank,) if self.chunks_per_rank == 1 else (rank, 2 * self.size - 1 - rank)

    @cached_property
    def chunks(self) -> tuple[int, ...]:
        """Numbers of the chunks held here."""
        return self.chunks_of(self.rank)

    @cached_property
    def spans(self) -> tuple[range, ...]:
        """Positions of each chunk held here."""
        length = self.chunk_length
        return tuple(range(c * length, (c + 1) * length) for c in self.chunks)

    @cached_property
    def positions(self) -> Tensor:
        """(local_length,): the position in the sequence of every token held here."""
        return torch.cat([torch.arange(span.start, span.stop) for span in self.spans])

    def take(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor that holds the whole sequence along ``dim``."""
        if self.size == 1:
            return x
        return torch.cat([x.narrow(dim, span.start, len(span)) for span in self.spans], dim)

    def cut(self, x: Tensor, dim: int) -> tuple[Tensor, ...]:
        """The chunks of a tensor that holds this rank's tokens along ``dim``."""
        return torch.split(x, self.chunk_length, dim)

    @cached_property
    def arrival_order(self) -> tuple[int, ...]:
        """Chunk numbers in the order in which a gather over the ranks brings them."""
        return tuple(chain.from_iterable(self.chunks_of(rank) for rank in range(self.size)))


@lru_cache(maxsize=16)
def _resized(share: SequenceShare, length: int) -> SequenceShare:
    """Kept, because a share computes its positions once."""
    return replace(share, length=length)


@dataclass(frozen=True)
class ContextParallel:
    """This rank's share of each sequence, and the exchanges with the ranks that hold the rest."""

    share: SequenceShare
    group: ProcessGroup
    exchange: Literal["gather", "all_to_all"] = "gather"
    """How softmax mixers meet the keys of the other ranks."""

    def over(self, length: int) -> ContextParallel:
        """The same ranks over sequences of another length, as while ``train.sequence_ramp`` lasts."""
        return self if length == self.share.length else replace(self, share=_resized(self.share, length))

    def gather_chunks(self, x: Tensor) -> Tensor:
        """(chunks held here, ...) -> (all chunks, ...) in the order of the sequence; backward sums over the ranks."""
        if self.share.size == 1:
            return x
        arrived = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.group)
        return _reordered(arrived, self.share.arrival_order)

    def gather(self, x: Tensor) -> Tensor:
        """(S_local, ...) -> (S, ...): the whole sequence on every rank."""
        chunks = torch.unflatten(x, 0, (self.share.chunks_per_rank, self.share.chunk_length))
        return self.gather_chunks(chunks).flatten(0, 1)

    @contextmanager
    def gathered(self, x: Tensor, *, recomputed: bool) -> Iterator[Tensor]:
        """``gather`` for the operations inside, which keep nothing of the whole for the backward pass.

        It is gathered again there, so that what a rank keeps falls with the number of ranks. Activation recompute
        (``recomputed``) repeats the gather by itself.
        """
        whole = self.gather(x)
        again = _GatheredAgain(self, x.detach(), whole)
        with nullcontext() if recomputed else saved_tensors_hooks(again.pack, again.unpack):
            yield whole

    def scatter_heads(self, x: Tensor) -> Tensor:
        """(S_local, B, R, W), dimension 2 being groups of heads -> (S, B, W): all tokens of this rank's group."""
        share = self.share
        arrived = all_to_all(self.group, x.permute(2, 0, 1, 3).flatten(0, 1))
        chunks = torch.unflatten(arrived, 0, (-1, share.chunk_length))
        return _reordered(chunks, share.arrival_order).flatten(0, 1)

    def gather_heads(self, x: Tensor) -> Tensor:
        """The inverse of ``scatter_heads``."""
        share = self.share
        chunks = torch.unflatten(x, 0, (-1, share.chunk_length))
        ordered = torch.stack([chunks[number] for number in share.arrival_order])
        arrived = all_to_all(self.group, ordered.flatten(0, 1))
        return torch.unflatten(arrived, 0, (share.size, -1)).permute(1, 2, 0, 3)

    def halo(self, x: Tensor, rows: int) -> tuple[Tensor, ...]:
        """The ``rows`` tokens before each chunk held here, fewer where the sequence begins.

        x (S_local, ...) -> one (<= rows, ...) tensor per chunk. Tokens come from as many ranks as hold them, and
        the backward pass adds their gradients up where they are held.
        """
        plan = _halo_plan(self.share, rows, x.device)
        arrived = all_to_all(self.group, x[plan.send], list(plan.arrivals), list(plan.departures))
        return torch.split(arrived[plan.place], list(plan.rows))


class _View(NamedTuple):
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _GatheredAgain:
    """Stands in for what autograd would keep of a gathered tensor: the gather is repeated when the first is needed.

    What is kept is asked for once: the graph must not be used for a second backward pass.
    """

    def __init__(self, context: ContextParallel, local: Tensor, whole: Tensor) -> None:
        self._context, self._local, self._address = context, local, whole.untyped_storage().data_ptr()
        self._whole: Tensor | None = None
        self._views = 0

    def pack(self, kept: Tensor) -> Tensor | _View:
        if kept.untyped_storage().data_ptr() != self._address:
            return kept
        self._views += 1
        return _View(kept.size(), kept.stride(), int(kept.storage_offset()))

    def unpack(self, packed: Tensor | _View) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if self._whole is None:
            self._whole = self._context.gather(self._local)
        view = self._whole.as_strided(*packed)
        self._views -= 1
        if self._views == 0:
            self._whole = None
        return view


def _reordered(x: Tensor, numbers: tuple[int, ...]) -> Tensor:
    """x sorted along dimension 0, where its element i has number ``numbers[i]``."""
    if numbers == tuple(range(len(numbers))):
        return x
    return torch.stack([x[i] for i in sorted(range(len(numbers)), key=numbers.__getitem__)])


@dataclass(frozen=True)
class _HaloPlan:
    """Who sends which tokens to whom."""

    send: Tensor
    """Local indices of the tokens to send, for each receiver in turn."""
    departures: tuple[int, ...]
    """How many of them go to each rank."""
    arrivals: tuple[int, ...]
    """How many tokens come from each rank."""
    place: Tensor
    """For each token of the halos, chunk by chunk, its index among the arrivals."""
    rows: tuple[int, ...]
    """Tokens in the halo of each chunk held here."""


@lru_cache(maxsize=64)
def _halo_plan(share: SequenceShare, rows: int, device: torch.device) -> _HaloPlan:
    wanted = [_halo_positions(share, rank, rows) for rank in range(share.size)]
    owners = [_owners(share, torch.cat(halos)) for halos in wanted]
    local = {int(position): index for index, position in enumerate(share.positions)}
    departures = [torch.cat(halos)[owner == share.rank] for halos, owner in zip(wanted, owners, strict=True)]
    mine = owners[share.rank]
    place = torch.empty_like(mine)
    place[mine.argsort(stable=True)] = torch.arange(mine.numel())
    return _HaloPlan(
        send=torch.tensor([local[int(p)] for p in torch.cat(departures)], dtype=torch.long, device=device),
        departures=tuple(positions.numel() for positions in departures),
        arrivals=tuple(int((mine == rank).sum()) for rank in range(share.size)),
        place=place.to(device),
        rows=tuple(halo.numel() for halo in wanted[share.rank]),
    )


def _halo_positions(share: SequenceShare, rank: int, rows: int) -> list[Tensor]:
    """Positions before each chunk of ``rank`` that it needs."""
    starts = [chunk * share.chunk_length for chunk in share.chunks_of(rank)]
    return [torch.arange(max(0, start - rows), start) for start in starts]


def _owners(share: SequenceShare, positions: Tensor) -> Tensor:
    """The rank that holds each position."""
    owner = torch.empty(len(share.arrival_order), dtype=torch.long)
    owner[list(share.arrival_order)] = torch.arange(share.size).repeat_interleave(share.chunks_per_rank)
    return owner[positions // share.chunk_length]
