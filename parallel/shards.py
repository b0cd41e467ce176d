"""The model and its optimizer as global tensors: what Megatron-Core's sharded checkpoints are made of.

Every section of every parameter is one global tensor under its global name, so a checkpoint says nothing of the
layout that wrote it. The same holds for the optimizer's state of it, of which each rank has a few rectangles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

from .engine import Engine, Owned
from .parameters import Blueprint, blueprint_of, global_names, section_name
from .pieces import rectangles


def sharded_state(engine: Engine) -> dict[str, Any]:
    """Model and optimizer as a tree of Megatron-Core's sharded tensors over their live memory."""
    return {"model": sharded_parameters(engine), "optimizer": sharded_optimizer(engine)}


def sharded_optimizer(engine: Engine) -> dict[str, ShardedTensor]:
    """The pieces of optimizer state that this rank owns."""
    return {
        f"{shard.key}@{shard.global_offset}": shard
        for prefix, owned in _named(engine)
        for key, flat in owned.state.items()
        for shard in _pieces(f"optimizer.state.{key}.{prefix}", owned, flat, engine)
    }


def sharded_parameters(engine: Engine) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """The parameters of this rank's chunks by global name, or the pieces of them that it holds."""
    if engine.divides_parameters:
        return {
            f"{shard.key}@{shard.global_offset}": shard
            for prefix, owned in _named(engine)
            for shard in _pieces(prefix, owned, _saved_weight(engine, owned), engine)
        }
    return {
        _entry(prefix, parameter): _shard(prefix, parameter, engine)
        for chunk in engine.chunks
        for prefix, parameter in global_names(chunk, chunk.global_name)
    }


def loaded_parameters(engine: Engine, loaded: dict[str, Tensor]) -> dict[nn.Parameter, Tensor]:
    """What a checkpoint gave for ``sharded_parameters``, where these are whole, for the parameters themselves."""
    if engine.divides_parameters:
        return {}
    return {
        parameter: loaded[_entry(prefix, parameter)]
        for chunk in engine.chunks
        for prefix, parameter in global_names(chunk, chunk.global_name)
    }


def _saved_weight(engine: Engine, owned: Owned) -> Tensor:
    """Vectors are in fp32 in every checkpoint, whatever the engine computes with."""
    return engine.weight_of(owned) if owned.parameter.dim() > 1 else owned.state["param"]


def _named(engine: Engine) -> Iterator[tuple[str, Owned]]:
    """What this rank owns, with the global name of its parameter."""
    prefixes = {p: prefix for chunk in engine.chunks for prefix, p in global_names(chunk, chunk.global_name)}
    for owned in engine.owned():
        yield prefixes[owned.parameter], owned


def _pieces(prefix: str, owned: Owned, flat: Tensor, engine: Engine) -> Iterator[ShardedTensor]:
    """``flat``, which has the elements of ``owned``, as rectangles of global tensors."""
    topology = engine.topology
    pieces = rectangles(
        blueprint_of(owned.parameter), owned.start, owned.stop, topology.tensor_rank, topology.layout.tensor
    )
    replica = _replica(owned.parameter, engine)
    for piece in pieces:
        yield ShardedTensor(
            key=section_name(prefix, piece.section),
            data=flat[piece.start - owned.start :][: piece.elements].view(piece.shape),
            dtype=flat.dtype,
            local_shape=piece.shape,
            global_shape=piece.section.shape,
            global_offset=piece.offset,
            axis_fragmentations=None,  # an irregular grid
            replica_id=(*replica, owned.copy),
        )


def _entry(prefix: str, parameter: nn.Parameter) -> str:
    """A key for this parameter within the rank; the tied copy of the embedding has the embedding's."""
    return "+".join(section_name(prefix, section) for section in blueprint_of(parameter).sections)


def _shard(prefix: str, parameter: nn.Parameter, engine: Engine) -> ShardedTensor | ShardedTensorFactory:
    blueprint = blueprint_of(parameter)
    topology = engine.topology
    replica = (*_replica(parameter, engine), topology.groups.dp_cp.rank())
    offsets = () if blueprint.partition is None else (
        (blueprint.partition, topology.tensor_rank, topology.layout.tensor),
    )  # fmt: skip
    if len(blueprint.sections) == 1:
        name = section_name(prefix, blueprint.sections[0])
        return ShardedTensor.from_rank_offsets(name, parameter, *offsets, replica_id=replica)
    return _fused(prefix, parameter, blueprint, offsets, replica, topology.layout.tensor)


def _replica(parameter: nn.Parameter, engine: Engine) -> tuple[int, int]:
    """Which copy this is among pipeline stages and tensor ranks that hold the same; (0, 0) is written."""
    tied_copy = int(getattr(parameter, "shared", False))
    return tied_copy, engine.topology.tensor_rank if blueprint_of(parameter).partition is None else 0


def _fused(
    prefix: str,
    parameter: nn.Parameter,
    blueprint: Blueprint,
    offsets: tuple[tuple[int, int, int], ...],
    replica: tuple[int, int, int],
    tensor_size: int,
) -> ShardedTensorFactory:
    """Several projections in one parameter: taken apart when written, joined when read."""
    rows = blueprint.local_rows(tensor_size)
    names = [section.name for section in blueprint.sections]

    @torch.no_grad()
    def build(key: str, tensor: Tensor, replica_id: Any, _: slice | None) -> dict[str, ShardedTensor]:
        parts = zip(names, torch.split(tensor, rows), strict=True)
        return {
            name: ShardedTensor.from_rank_offsets(f"{key}.{name}", part, *offsets, replica_id=replica_id)
            for name, part in parts
        }

    def merge(parts: dict[str, Tensor]) -> Tensor:
        return torch.cat([parts[name] for name in names])

    return ShardedTensorFactory(prefix, parameter, build, merge, replica)
