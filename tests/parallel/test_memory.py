"""What context parallelism and recompute are for: how much each rank keeps for the backward pass."""

from __future__ import annotations

import pytest
from stacks import hybrid
from training import config_of

from trine.configs.layouts import parse_layout, under_layout
from trine.launch.pool import RankPool

pytestmark = pytest.mark.timeout(240)


def kept(ranks: RankPool, name: str) -> int:
    """The most bytes that a rank keeps."""
    layout = parse_layout(name)
    config = config_of(hybrid(), train={"sequence_length": 512, "global_batch_size": 1, "micro_batch_size": 1})
    raw = under_layout(config, layout).model_dump(mode="json", exclude_none=True)
    return max(ranks.run("memory:kept_activations", layout.world_size, config=raw))


def test_kept_activations_fall_with_the_context_size(ranks: RankPool) -> None:
    """Near a half and a quarter: nothing that is gathered is kept, but for the one K,V that YOCO's layers share."""
    whole = kept(ranks, "tp1")
    assert kept(ranks, "cp2") <= 0.55 * whole
    assert kept(ranks, "cp4") <= 0.30 * whole


def test_recompute_keeps_less(ranks: RankPool) -> None:
    """``full`` keeps one hidden state per layer, the shared K,V and what the output layer needs."""
    whole = kept(ranks, "tp1")
    assert kept(ranks, "selective") <= 0.80 * whole
    assert kept(ranks, "recompute") <= 0.20 * whole
