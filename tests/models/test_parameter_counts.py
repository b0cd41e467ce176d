"""Every recipe, built without memory, has the parameters that the closed form counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trine.configs.loading import RECIPES, load_config
from trine.configs.parameters import count_parameters
from trine.models.build import build_chunks, local_parameters
from trine.parallel.topology import Topology

ALL = sorted(path.relative_to(RECIPES) for path in RECIPES.rglob("*.yaml"))


@pytest.mark.parametrize("recipe", ALL, ids=str)
def test_meta_model_has_the_published_count(recipe: Path, one_rank: Topology) -> None:
    layout = ["parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence=false", "model.vocabulary_size=2048"]
    overrides = layout if recipe.name == "demo.yaml" else layout[:3]
    config = load_config(RECIPES / recipe, overrides)
    with torch.device("meta"):
        chunks = build_chunks(config, replace(one_rank, device=torch.device("meta")))
    assert all(p.is_meta for chunk in chunks for p in chunk.parameters())
    assert local_parameters(chunks) == count_parameters(config.model).total
