"""Identities that hold for every size, cut, window and packing, forward and backward, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trine.kernels import reference
from trine.kernels.attention import attention
from trine.kernels.differential import differential_attention, differential_attention_v2
from trine.kernels.retention import chunk_state, retention

Check = Callable[..., None]

FEW = settings(max_examples=30, deadline=None, derandomize=True, database=None)
ROWS = 2
WINDOWS = st.none() | st.integers(1, 160)


@st.composite
def packings(draw: st.DrawFn, length: int) -> Tensor | None:
    """(2, length) bool: the tokens, few of them, with which documents start, or None."""
    firsts = draw(st.lists(st.sets(st.integers(0, length - 1), max_size=6), min_size=ROWS, max_size=ROWS) | st.none())
    if firsts is None:
        return None
    resets = torch.zeros(ROWS, length, dtype=torch.bool)
    for row, tokens in enumerate(firsts):
        resets[row, list(tokens)] = True
    return resets


def starts_of(resets: Tensor | None) -> Tensor | None:
    """(2, length) int64: the start of each token's document, 0 for the one that has begun before."""
    return None if resets is None else torch.where(resets, torch.arange(resets.shape[1]), 0).cummax(dim=1).values


def part_of(x: Tensor | None, part: slice) -> Tensor | None:
    return None if x is None else x[:, part]


def cuts(length: int) -> st.SearchStrategy[list[slice]]:
    """Up to five pieces that make up the whole."""

    def pieces(points: set[int]) -> list[slice]:
        edges = [0, *sorted(points), length]
        return [slice(*edge) for edge in pairwise(edges)]

    return st.sets(st.integers(1, length - 1), max_size=4).map(pieces) if length > 1 else st.just([slice(0, 1)])


def randn(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shapes[0]))
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def retention_inputs(length: int, fixed: bool) -> list[Tensor]:
    """q, k, v, log-decay and initial state."""
    q, k, v, state, gate = randn(*((ROWS, 2, length, d) for d in (4, 4, 3)), (ROWS, 2, 4, 3), (ROWS, 2, length))
    decay = torch.tensor([-0.03, -0.9], dtype=torch.float64) if fixed else -gate.detach().square()
    return [q, k, v, decay.requires_grad_(not fixed), state]


class TestRetention:
    @FEW
    @given(data=st.data(), length=st.integers(1, 40), chunk_size=st.integers(1, 45), fixed=st.booleans())
    def test_the_three_forms_agree(
        self, assert_same: Check, data: st.DataObject, length: int, chunk_size: int, fixed: bool
    ) -> None:
        resets = data.draw(packings(length), label="resets")
        inputs = retention_inputs(length, fixed)

        def chunkwise(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return retention(q, k, v, decay, initial_state=state, resets=resets, chunk_size=chunk_size)

        assert_same(chunkwise, lambda *x: reference.retention(*x, resets), inputs)
        assert_same(chunkwise, lambda *x: reference.retention_recurrent(*x, resets), inputs)

    @FEW
    @given(data=st.data(), length=st.integers(1, 40), chunk_size=st.integers(1, 45), fixed=st.booleans())
    def test_pieces_joined_by_their_states_are_the_whole(
        self, assert_same: Check, data: st.DataObject, length: int, chunk_size: int, fixed: bool
    ) -> None:
        """What ranks do that hold a piece each: P_{r+1} = A_r P_r + S_r."""
        resets = data.draw(packings(length), label="resets")
        parts = data.draw(cuts(length), label="parts")

        def in_pieces(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            outputs = []
            for part in parts:
                qkv = [x[:, :, part] for x in (q, k, v)]
                decay = log_decay if fixed else log_decay[:, :, part]
                firsts = part_of(resets, part)
                output, _ = retention(*qkv, decay, initial_state=state, resets=firsts, chunk_size=chunk_size)
                left, across = chunk_state(*qkv[1:], decay, firsts)
                state = across[..., None, None] * state + left
                outputs.append(output)
            return torch.cat(outputs, dim=2), state

        assert_same(in_pieces, lambda *x: reference.retention(*x, resets), retention_inputs(length, fixed))


class TestAttention:
    @FEW
    @given(data=st.data(), length=st.integers(1, 150), window=WINDOWS)
    def test_pieces_that_see_all_keys_are_the_whole(
        self, assert_same: Check, data: st.DataObject, length: int, window: int | None
    ) -> None:
        starts = starts_of(data.draw(packings(length), label="resets"))
        parts = data.draw(cuts(length), label="parts")

        def in_pieces(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            outputs = [
                attention(
                    q[:, :, part],
                    k[:, :, : part.stop],
                    v[:, :, : part.stop],
                    window=window,
                    document_start=part_of(starts, part),
                )
                for part in parts
            ]
            return torch.cat(outputs, dim=2)

        inputs = randn((ROWS, 4, length, 4), (ROWS, 2, length, 4), (ROWS, 2, length, 4))
        assert_same(in_pieces, lambda *x: reference.attention(*x, window, starts), inputs)

    @FEW
    @given(data=st.data(), length=st.integers(1, 150), window=st.integers(1, 160))
    def test_a_piece_needs_only_the_keys_of_its_window(
        self, assert_same: Check, data: st.DataObject, length: int, window: int
    ) -> None:
        starts = starts_of(data.draw(packings(length), label="resets"))
        first = data.draw(st.integers(0, length - 1), label="first query")
        near = max(0, first - window + 1)

        def last_piece(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            own = None if starts is None else starts[:, first:] - near
            return attention(q[:, :, first:], k[:, :, near:], v[:, :, near:], window=window, document_start=own)

        inputs = randn((ROWS, 4, length, 4), (ROWS, 2, length, 4), (ROWS, 2, length, 3))
        assert_same(last_piece, lambda *x: reference.attention(*x, window, starts)[:, :, first:], inputs)


class TestDifferential:
    @FEW
    @given(data=st.data(), length=st.integers(1, 150), queries=st.integers(1, 150), kv_pairs=st.sampled_from([1, 2]))
    def test_v1_is_the_difference_of_two_attentions(
        self, assert_same: Check, data: st.DataObject, length: int, queries: int, kv_pairs: int
    ) -> None:
        queries = min(queries, length)
        starts = part_of(starts_of(data.draw(packings(length), label="resets")), slice(length - queries, None))

        def by_two(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
            first, second = (attention(q[:, s::2], k[:, s::2], v, document_start=starts) for s in (0, 1))
            return first - lam * second

        heads = ((4, queries, 4), (2 * kv_pairs, length, 4), (kv_pairs, length, 8))
        inputs = randn(*((ROWS, *size) for size in heads), ())
        assert_same(lambda *x: differential_attention(*x, document_start=starts), by_two, inputs)

    @FEW
    @given(data=st.data(), length=st.integers(1, 150), queries=st.integers(1, 150), kv_heads=st.sampled_from([1, 2]))
    def test_v2_is_the_difference_of_two_attentions(
        self, assert_same: Check, data: st.DataObject, length: int, queries: int, kv_heads: int
    ) -> None:
        queries = min(queries, length)
        starts = part_of(starts_of(data.draw(packings(length), label="resets")), slice(length - queries, None))

        def by_two(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
            first, second = (attention(q[:, s::2], k, v, document_start=starts) for s in (0, 1))
            return first - lam.unsqueeze(-1) * second

        sizes = ((4, queries, 4), (kv_heads, length, 4), (kv_heads, length, 4), (2, queries))
        inputs = randn(*((ROWS, *size) for size in sizes))
        assert_same(lambda *x: differential_attention_v2(*x, document_start=starts), by_two, inputs)
