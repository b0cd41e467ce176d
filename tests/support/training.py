"""Jobs for the rank pool: parity's training steps, with a checkpoint before or after them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trine.configs.errors import RunError
from trine.configs.schema import Config
from trine.parallel import checkpoint
from trine.pretrain.parity import ADAM_EPS, StepsOfRank, joined_engine, take_steps

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
    """Train ``steps`` steps, from the checkpoint ``load`` if there is one, and ``save`` one at the end."""
    with joined_engine(rank, world_size, Config.model_validate(config)) as engine:
        if load is not None:
            first_step = checkpoint.load(Path(load), engine)["steps"]
        result = take_steps(engine, steps, first_step)
        if save is not None:
            last = first_step + steps
            checkpoint.save(Path(save), last, engine, {"steps": last}, keep=2)
    return result


def error_of_loading(rank: int, world_size: int, *, config: dict[str, Any], load: str) -> str:
    """What this rank says of a checkpoint that it should refuse."""
    with joined_engine(rank, world_size, Config.model_validate(config)) as engine:
        try:
            found = checkpoint.find(Path(load).parent)
            assert found is not None
            checkpoint.load(found[0], engine)
        except RunError as error:
            return str(error)
    return "loaded"
