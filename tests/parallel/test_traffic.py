"""How often context ranks talk: what docs/parallelism.md says of each mixer."""

from __future__ import annotations

import pytest
from stacks import stack_of
from training import config_of

from trine.configs.layouts import parse_layout, under_layout
from trine.launch.pool import RankPool

LAYERS = 5
GATHERED = {"allgather_base": 2 * LAYERS, "reduce_scatter_base": LAYERS}
"""K,V, or states, once per layer, again in the backward pass, and the sum of their gradients."""
EXPECTED: dict[str, tuple[str, dict[str, int]]] = {
    "attention": ("cp2", GATHERED),
    "differential": ("cp2", GATHERED),
    "differential_v2": ("cp2+a2a", {"alltoall_base": 4 * LAYERS}),
    "sliding_window": ("cp2", {"alltoall_base": 2 * LAYERS}),
    "retention": ("cp2", GATHERED),
    "gated_retention": ("cp2+recompute", GATHERED),
    # One self layer before them, then one gather for four cross layers and one sum of all their gradients.
    "cross_attention": ("cp2", {"allgather_base": 2 + 1, "reduce_scatter_base": 1 + 1}),
    "differential_cross_attention": ("cp2", {"allgather_base": 2 + 1, "reduce_scatter_base": 1 + 1}),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("mixer", EXPECTED)
def test_collectives_of_a_step(ranks: RankPool, mixer: str) -> None:
    name, expected = EXPECTED[mixer]
    layout = parse_layout(name)
    config = under_layout(config_of(stack_of(mixer)), layout).model_dump(mode="json", exclude_none=True)
    for found in ranks.run("traffic:collectives", layout.world_size, config=config):
        assert found == expected
