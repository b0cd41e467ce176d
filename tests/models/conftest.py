"""One process that holds whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trine.configs.schema import Config
from trine.models.site import Site
from trine.parallel import topology
from trine.parallel.engine_config import engine_config


@pytest.fixture
def config_for() -> Callable[..., Config]:
    """A run around a model: ``config_for(stack=[...], hidden_size=..., sequence_length=...)``."""

    def make(*, sequence_length: int = 16, **model: Any) -> Config:
        return Config.model_validate(
            {
                "model": {"vocabulary_size": 48, "vocabulary_multiple": 16, "ffn_hidden_size": 48} | model,
                "train": {"steps": 1, "global_batch_size": 1, "sequence_length": sequence_length},
                "data": {"directory": "unused"},
                "run": {"directory": "unused"},
            }
        )

    return make


@pytest.fixture
def site_for(one_rank: topology.Topology) -> Callable[..., Site]:
    """Where modules of a configuration are built: ``site_for(config, layer=..., device=...)``."""

    def make(config: Config, layer: int = 0, device: str = "cpu") -> Site:
        place = torch.device(device)
        engine = engine_config(config, torch.device("cpu"))
        return Site(config.model, engine, one_rank.groups, place, config.train.recompute, layer=layer)

    return make
