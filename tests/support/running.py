"""Jobs for the rank pool that are whole runs, as ``trine pretrain`` makes them."""

from __future__ import annotations

from typing import Any

from trine.configs.checks import check_layout
from trine.configs.errors import RunError, UsageError
from trine.configs.loading import set_vocabulary
from trine.configs.schema import Config
from trine.data_pipeline.opening import read_prepared
from trine.parallel.topology import build_topology, local_device
from trine.pretrain.place import Place
from trine.pretrain.trainer import Trainer


def pretrain(rank: int, world_size: int, *, config: dict[str, Any], own_data: dict[str, str] | None = None) -> None:
    """One rank's part in a run: what it writes is the result.

    ``own_data`` names, by rank, ranks that read a copy of the data of their own, as from a disk of their node.
    """
    if own_data and str(rank) in own_data:
        config["data"]["directory"] = own_data[str(rank)]
    run = Config.model_validate(config)
    prepared = read_prepared(run.data)
    run = set_vocabulary(run, prepared.vocabulary_size)
    topology = build_topology(check_layout(run, world_size), local_device(rank))
    Trainer(run, topology, Place(rank, world_size, rank, world_size, "local"), prepared).run()


def refused(rank: int, world_size: int, *, config: dict[str, Any]) -> str:
    """What a run says that all ranks must refuse or end alike; they live on for the next job."""
    try:
        pretrain(rank, world_size, config=config)
    except (UsageError, RunError) as error:
        return str(error)
    return "finished"
