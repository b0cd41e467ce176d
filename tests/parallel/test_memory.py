"""What context parallelism is for: each rank keeps its share of the activations and no more."""

from __future__ import annotations

import pytest
from stacks import hybrid
from training import config_of

from trine.configs.layouts import parse_layout, under_layout
from trine.launch.pool import RankPool


@pytest.mark.timeout(240)
def test_kept_activations_fall_with_the_context_size(ranks: RankPool) -> None:
    """Near a half and a quarter: gathered K,V are not kept, but for the one that YOCO's layers share."""
    kept: dict[int, int] = {}
    train = {"sequence_length": 512, "global_batch_size": 1, "micro_batch_size": 1}
    for size in (1, 2, 4):
        layout = parse_layout(f"cp{size}")
        config = under_layout(config_of(hybrid(), train=train), layout).model_dump(mode="json", exclude_none=True)
        kept[size] = max(rank["kept"] for rank in ranks.run("memory:activations", size, config=config))
    assert kept[2] <= 0.55 * kept[1]
    assert kept[4] <= 0.30 * kept[1]
