"""Jobs for the rank pool: train a small model under a layout and say everything that must not depend on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trine.configs.checks import check_layout
from trine.configs.errors import RunError
from trine.configs.schema import Config
from trine.models.build import build_chunks
from trine.parallel import checkpoint
from trine.parallel.engine import Engine
from trine.parallel.parameters import blueprint_of, global_names, section_name
from trine.parallel.topology import Topology, build_topology, local_device

VOCABULARY = 200

ADAM_EPS = 1e-5
"""AdamW moves every element by about the learning rate, whatever its gradient: with the usual 1e-8 an element whose
gradient is rounding error alone takes a full step in a random direction. This eps holds such elements still, so that
later steps can be compared as closely as the first."""


def config_of(stack: list[dict[str, Any]], **sections: Any) -> Config:
    """A tiny run around ``stack``: odd widths, a padded vocabulary, a length that is no multiple of a chunk."""
    raw: dict[str, Any] = {
        "model": {"vocabulary_size": VOCABULARY, "hidden_size": 48, "ffn_hidden_size": 72, "stack": stack},
        "train": {"steps": 5, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 22},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "eps": ADAM_EPS},
        "data": {"directory": "unused"},
        "run": {"directory": "unused"},
    }
    for name, values in sections.items():
        raw[name] = raw.get(name, {}) | values
    return Config.model_validate(raw)


def train(
    rank: int,
    world_size: int,
    *,
    config: dict[str, Any],
    steps: int = 5,
    first_step: int = 0,
    load: str | None = None,
    save: str | None = None,
) -> dict[str, Any]:
    """Train ``steps`` steps; returns losses, norms, this rank's pieces of the first gradients and last parameters."""
    run = Config.model_validate(config)
    topology = build_topology(check_layout(run, world_size), local_device(rank))
    engine = Engine(build_chunks(run, topology), run, topology)
    if load is not None:
        first_step = checkpoint.load(Path(load), engine)["steps"]
    losses, norms, rates, gradients = [], [], [], []
    for step in range(first_step, first_step + steps):
        result, pieces = _step(engine, run, topology, step)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        rates.append(result.learning_rate)
        gradients = gradients or pieces
    if save is not None:
        checkpoint.save(Path(save), first_step + steps, engine, {"steps": first_step + steps}, keep=2)
    evaluation = engine.evaluate(_batch(run, topology, 0), topology.layout.num_microbatches)
    parameters = list(_pieces(engine, lambda p: p.data))
    engine.close()
    return {
        "losses": losses,
        "grad_norms": norms,
        "learning_rates": rates,
        "gradients": gradients,
        "parameters": parameters,
        "evaluation": evaluation,
    }


def error_of_loading(rank: int, world_size: int, *, config: dict[str, Any], load: str) -> str:
    """What this rank says of a checkpoint that it should refuse."""
    run = Config.model_validate(config)
    topology = build_topology(check_layout(run, world_size), local_device(rank))
    engine = Engine(build_chunks(run, topology), run, topology)
    try:
        found = checkpoint.find(Path(load).parent)
        assert found is not None
        checkpoint.load(found[0], engine)
    except RunError as error:
        return str(error)
    finally:
        engine.close()
    return "loaded"


def whole(ranks: list[dict[str, Any]], key: str) -> dict[str, Tensor]:
    """Put the pieces of every rank together: full tensors by global name."""
    found: dict[str, dict[tuple[int, int], Tensor]] = {}
    shapes: dict[str, tuple[tuple[int, ...], int | None]] = {}
    for result in ranks:
        for name, shape, partition, tensor_rank, start, piece in result[key]:
            found.setdefault(name, {})[tensor_rank, start] = piece
            shapes[name] = (shape, partition)
    return {name: _join(found[name], *shapes[name]) for name in found}


def copies(ranks: list[dict[str, Any]], key: str) -> dict[str, list[Tensor]]:
    """Every rank's copy of each replicated tensor, pieces of data-parallel shards put together."""
    found: dict[str, dict[int, dict[int, Tensor]]] = {}
    for result in ranks:
        for name, _, partition, tensor_rank, start, piece in result[key]:
            if partition is None:
                found.setdefault(name, {}).setdefault(tensor_rank, {})[start] = piece
    return {
        name: [torch.cat([shards[s] for s in sorted(shards)]) for shards in by_rank.values()]
        for name, by_rank in found.items()
    }


def _join(pieces: dict[tuple[int, int], Tensor], shape: tuple[int, ...], partition: int | None) -> Tensor:
    tensor_ranks = sorted({tensor_rank for tensor_rank, _ in pieces})
    flat = [
        torch.cat([pieces[key] for key in sorted(pieces) if key[0] == tensor_rank]) for tensor_rank in tensor_ranks
    ]
    if partition is None:
        return flat[0].view(shape)
    local = list(shape)
    local[partition] //= len(flat)
    return torch.cat([block.view(local) for block in flat], dim=partition)


def _step(engine: Engine, run: Config, topology: Topology, step: int) -> tuple[Any, list[Any]]:
    pieces: list[Any] = []
    optimizer_step = engine.optimizer.step

    def look_and_step() -> Any:
        pieces.extend(_pieces(engine, lambda p: p.main_grad))
        return optimizer_step()

    engine.optimizer.step = look_and_step
    try:
        return engine.train_step(_batch(run, topology, step)), pieces
    finally:
        engine.optimizer.step = optimizer_step


def _batch(run: Config, topology: Topology, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The step's samples: the same global batch on every layout, of which each data rank takes its share."""
    train, layout = run.train, topology.layout
    generator = torch.Generator().manual_seed(step)
    shape = (train.global_batch_size, train.sequence_length + 1)
    tokens = torch.randint(0, VOCABULARY, shape, generator=generator)
    mine = tokens.chunk(layout.data)[topology.data_rank]
    for part in mine.split(train.micro_batch_size):
        yield part[:, :-1], part[:, 1:]


def _pieces(engine: Engine, of: Any) -> Iterator[tuple[str, tuple[int, ...], int | None, int, int, Tensor]]:
    """(global name, full shape, cut dimension, tensor rank, start, values) of what this rank owns.

    The distributed optimizer reduces each gradient to the data-parallel rank that owns its part, so a rank answers
    for its own range of the flattened parameter alone.
    """
    optimizer = engine.optimizer.chained_optimizers[0]
    topology = engine.topology
    for chunk in engine.chunks:
        for prefix, parameter in global_names(chunk, chunk.global_name):
            if getattr(parameter, "shared", False) or parameter not in optimizer.model_param_gbuf_map:
                continue
            blueprint = blueprint_of(parameter)
            values = of(parameter).detach().float().flatten()
            owned = _owned_range(optimizer, parameter)
            offset = 0
            for section, rows in zip(blueprint.sections, blueprint.local_rows(topology.layout.tensor), strict=True):
                count = rows * (parameter.numel() // parameter.shape[0])
                start, stop = max(owned.start, offset), min(owned.stop, offset + count)
                if start < stop:
                    name = section_name(prefix, section)
                    piece = values[start:stop].clone()
                    yield name, section.shape, blueprint.partition, topology.tensor_rank, start - offset, piece
                offset += count


def _owned_range(optimizer: Any, parameter: Any) -> range:
    try:
        owned = optimizer._get_model_param_range_map(parameter)["param"]
    except KeyError:
        return range(0)
    return range(owned.start, owned.end)
