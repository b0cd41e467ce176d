"""A small recipe that the tests of this room load, spoil and divide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from trine.configs.loading import load_config
from trine.configs.schema import Config

RECIPE = """\
model:
  hidden_size: 64
  ffn_hidden_size: 128
  stack:
    - {mixer: gated_retention, layers: 2, heads: 4}
    - {shared_kv: {kv_heads: 4, head_dim: 16}}
    - {mixer: cross_attention, layers: 2, heads: 4}
train: {steps: 100, global_batch_size: 8, sequence_length: 16}
data: {directory: data/small}
run: {directory: runs/small}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A YOCO of 4 layers in a file of its own."""
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def load(recipe: Path) -> Callable[..., Config]:
    """Load that recipe with the overrides given as arguments."""
    return lambda *overrides: load_config(recipe, overrides)
