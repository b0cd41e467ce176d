"""A small run whose data are prepared, for commands that check a run before they start it."""

from __future__ import annotations

from pathlib import Path

from small_folder import write_folder

RECIPE = """\
model:
  hidden_size: 32
  ffn_hidden_size: 64
  stack: [{mixer: attention, layers: 4, heads: 4}]
parallel: {tensor: 2}
train: {steps: 1000, global_batch_size: 32, sequence_length: 16}
data: {directory: data}
run: {directory: run}
"""


def write_run(folder: Path) -> Path:
    """Write ``recipe.yaml`` and the data that it names into ``folder``, to which its paths are relative."""
    write_folder(folder / "data")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    return path
