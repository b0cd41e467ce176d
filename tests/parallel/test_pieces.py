"""A flat range of a parameter is a few rectangles of global tensors, whatever the cut."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trine.parallel.parameters import ONES, Blueprint, Section
from trine.parallel.pieces import rectangles


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Blueprint, int, list[int]]:
    """A parameter of several sections, a tensor size, and where data ranks cut each tensor rank's flat part."""
    tensor = draw(st.integers(1, 3))
    vector, partition = draw(st.booleans()), draw(st.sampled_from([None, 0, 1]))
    if vector and partition == 1:
        partition = 0
    columns = draw(st.integers(1, 4)) * (tensor if partition == 1 else 1)
    rows = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    shapes = [(n * (tensor if partition == 0 else 1),) + (() if vector else (columns,)) for n in rows]
    blueprint = Blueprint(tuple(Section(f"s{n}", shape, ONES) for n, shape in enumerate(shapes)), partition)
    local = sum(torch.Size(shape).numel() for shape in shapes) // (tensor if partition is not None else 1)
    inner = draw(st.lists(st.integers(0, local), max_size=4))
    return blueprint, tensor, [0, *sorted(inner), local]


def local_part(whole: list[Tensor], blueprint: Blueprint, rank: int, size: int) -> Tensor:
    """What a tensor rank holds, flat."""
    cut = blueprint.partition
    parts = whole if cut is None else [section.chunk(size, dim=cut)[rank] for section in whole]
    return torch.cat(parts).flatten()


@settings(max_examples=200, deadline=None)
@given(cuts())
def test_the_pieces_of_all_ranks_are_the_global_tensors(cut: tuple[Blueprint, int, list[int]]) -> None:
    """Every element once on each tensor rank that holds it, in its place, and three pieces a section at most."""
    blueprint, size, bounds = cut
    whole = [torch.randperm(torch.Size(s.shape).numel()).view(s.shape) for s in blueprint.sections]
    found = {section.name: torch.full(section.shape, -1) for section in blueprint.sections}
    written = 0
    for rank in range(size):
        flat = local_part(whole, blueprint, rank, size)
        for start, stop in pairwise(bounds):
            pieces = list(rectangles(blueprint, start, stop, rank, size))
            assert len(pieces) <= 3 * len(blueprint.sections)
            assert sum(piece.elements for piece in pieces) == stop - start
            for piece in pieces:
                assert start <= piece.start <= stop - piece.elements
                place = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
                found[piece.section.name][place] = flat[piece.start :][: piece.elements].view(piece.shape)
                written += piece.elements
    copies = size if blueprint.partition is None else 1
    assert written == copies * sum(section.numel() for section in whole)
    assert all(torch.equal(found[s.name], w) for s, w in zip(blueprint.sections, whole, strict=True))
