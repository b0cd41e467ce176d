"""Jobs for the rank pool: parity's training steps, with a checkpoint before or after them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil

from trine.configs.errors import RunError
from trine.configs.schema import Checkpoint, Config
from trine.parallel.topology import leave_topology
from trine.pretrain.checkpoints import loading
from trine.pretrain.checkpoints.saving import CheckpointWriter
from trine.pretrain.parity import ADAM_EPS, StepsOfRank, batch_of_step, joined_engine, take_steps

VOCABULARY = 200


def config_of(stack: list[dict[str, Any]], **sections: Any) -> Config:
    """A tiny run around ``stack``: odd widths, a padded vocabulary, a length that is no multiple of a chunk."""
    raw: dict[str, Any] = {
        "model": {"vocabulary_size": VOCABULARY, "hidden_size": 48, "ffn_hidden_size": 72, "stack": stack},
        "train": {"steps": 5, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 136},
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
) -> StepsOfRank:
    """Train ``steps`` steps, from the newest checkpoint in ``load`` if it is given, and ``save`` one at the end."""
    with joined_engine(rank, world_size, Config.model_validate(config)) as engine:
        if load is not None:
            found = loading.find(Path(load), engine.topology, Checkpoint())
            assert found is not None
            loading.load(found, engine)
            first_step = found.run["steps"]
        result = take_steps(engine, steps, first_step)
        if save is not None:
            last = first_step + steps
            writer = CheckpointWriter(Path(save), engine, Checkpoint(keep=2))
            writer.begin(last, {"steps": last})
            writer.finish()
    return result


def saves_while_training(rank: int, world_size: int, *, config: dict[str, Any], save: str) -> StepsOfRank:
    """Train 5 steps; a checkpoint is begun after each and finished only after the next one."""
    run = Config.model_validate(config)
    with joined_engine(rank, world_size, run) as engine:
        writer = CheckpointWriter(Path(save), engine, run.checkpoint)
        for step in range(5):
            result = take_steps(engine, 1, step)
            writer.finish()
            writer.begin(step + 1, {"steps": step + 1})
        writer.finish()
    return result


def error_of_loading(rank: int, world_size: int, *, config: dict[str, Any], load: str) -> str:
    """What this rank says of the newest checkpoint in ``load``, which it should refuse."""
    run = Config.model_validate(config)
    with joined_engine(rank, world_size, run) as engine:
        try:
            found = loading.find(Path(load), engine.topology, run.checkpoint)
            assert found is not None
            loading.load(found, engine)
        except RunError as error:
            return str(error)
    return f"loaded {found.path.name}"


def threads_after_training(rank: int, world_size: int, *, config: dict[str, Any], save: str) -> int:
    """Train and save a step, let go of the engine, and count this worker's threads."""
    train(rank, world_size, config=config, steps=1, save=save)
    leave_topology()
    return psutil.Process().num_threads()


def train_after_a_skipped_step(rank: int, world_size: int, *, config: dict[str, Any], steps: int) -> StepsOfRank:
    """Compute the gradients of other samples and throw them away; the schedule then begins anew."""
    with joined_engine(rank, world_size, Config.model_validate(config)) as engine:
        before = engine.scheduler.state_dict()
        engine.compute_gradients(batch_of_step(engine, 99))
        engine.gradient_norm()
        engine.skip_update()
        engine.restore_schedule(before)
        return take_steps(engine, steps)
