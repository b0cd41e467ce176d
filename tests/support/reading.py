"""Jobs for the rank pool that say what a rank reads."""

from __future__ import annotations

from typing import Any

from trine.configs.checks import check_layout
from trine.configs.schema import Config
from trine.data_pipeline.opening import read_prepared
from trine.parallel.topology import build_topology, local_device
from trine.pretrain.parity import batch_of_step, joined_engine
from trine.pretrain.run_data import RunData


def synthetic(rank: int, world_size: int, *, config: dict[str, Any], step: int) -> list[tuple[Any, ...]]:
    """This rank's microbatches of a parity step."""
    with joined_engine(rank, world_size, Config.model_validate(config)) as engine:
        return [tuple(microbatch) for microbatch in batch_of_step(engine, step)]


def prepared(rank: int, world_size: int, *, config: dict[str, Any], consumed: int) -> list[tuple[Any, ...]]:
    """This rank's microbatches of the training step after ``consumed`` samples, then those of an evaluation."""
    run = Config.model_validate(config)
    topology = build_topology(check_layout(run, world_size), local_device(rank))
    data = RunData(run, topology, read_prepared(run.data))
    validation = data.validation(0) if run.evaluation.interval else ()
    found = [tuple(microbatch) for microbatch in (*data.training(consumed, 1), *validation)]
    data.close()
    return found
