"""Tensors of a divided model as pieces that ranks own, and the whole tensors put together from all ranks' pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..configs.errors import RunError
from ..parallel.engine import Engine, Owned
from ..parallel.parameters import blueprint_of, global_names, section_name

Piece = tuple[str, tuple[int, ...], int | None, int, int, Tensor]
"""What one rank owns of one tensor of the model: (global name, full shape, the dimension that tensor parallelism cuts
or None, tensor rank, first element, flat fp32 values). The first element counts within the tensor rank's part."""


def pieces_of(engine: Engine, values_of: Callable[[Owned], Tensor]) -> list[Piece]:
    """This rank's pieces of one tensor for each parameter, such as its gradient: ``values_of`` finds it.

    Gradients are reduced to the rank, among those that hold the same parameters, that owns them: over data and context
    ranks. So a rank answers for what it owns alone. The last stage's copy of tied embeddings is left out: it has no
    name of its own.
    """
    prefixes = {p: prefix for chunk in engine.chunks for prefix, p in global_names(chunk, chunk.global_name)}
    return [
        piece
        for owned in engine.owned()
        if not getattr(owned.parameter, "shared", False)
        for piece in _pieces(engine, prefixes[owned.parameter], owned, values_of(owned))
    ]


def whole(ranks: Sequence[Mapping[str, Any]], key: str) -> dict[str, Tensor]:
    """Full tensors by global name, from the pieces under ``key`` of what each rank returned.

    Of a replicated tensor the first tensor rank's copy is taken. Raises RunError where the ranks together do not hold
    every element.
    """
    return {name: versions[0] for name, versions in all_versions([rank[key] for rank in ranks]).items()}


def all_versions(pieces_by_rank: Sequence[Sequence[Piece]]) -> dict[str, list[Tensor]]:
    """Full tensors by global name: one copy per tensor rank of a replicated one, one of any other.

    Raises RunError where the ranks together do not hold every element.
    """
    parts: dict[str, dict[int, dict[int, Tensor]]] = {}
    kinds: dict[str, tuple[tuple[int, ...], int | None]] = {}
    for pieces in pieces_by_rank:
        for name, shape, cut, tensor_rank, start, values in pieces:
            parts.setdefault(name, {}).setdefault(tensor_rank, {})[start] = values
            kinds[name] = tuple(shape), cut
    return {name: _join(name, parts[name], *kinds[name]) for name in parts}


def _pieces(engine: Engine, prefix: str, owned: Owned, tensor: Tensor) -> Iterator[Piece]:
    blueprint, topology = blueprint_of(owned.parameter), engine.topology
    values = tensor.detach().float()
    offset = 0
    for section, count in zip(blueprint.sections, blueprint.local_elements(topology.layout.tensor), strict=True):
        start, stop = max(owned.start, offset), min(owned.stop, offset + count)
        if start < stop:
            part = values[start - owned.start : stop - owned.start].clone()
            name = section_name(prefix, section)
            yield name, section.shape, blueprint.partition, topology.tensor_rank, start - offset, part
        offset += count


def _join(name: str, parts: dict[int, dict[int, Tensor]], shape: tuple[int, ...], cut: int | None) -> list[Tensor]:
    blocks = [torch.cat([ranges[start] for start in sorted(ranges)]) for _, ranges in sorted(parts.items())]
    local = list(shape)
    if cut is not None:
        local[cut] //= len(blocks)
    for block in blocks:
        if block.numel() != torch.Size(local).numel():
            raise RunError(f"the ranks hold {block.numel()} of the {torch.Size(local).numel()} elements of {name}")
    tensors = [block.view(local) for block in blocks]
    return tensors if cut is None else [torch.cat(tensors, dim=cut)]
