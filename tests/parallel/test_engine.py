"""An engine that is let go takes its process groups with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from training import config_of

from trine.configs.layouts import parse_layout, under_layout
from trine.launch.pool import RankPool

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("layout", ["pp2", "dp2+zero1", "dp2+zero3"])
def test_no_threads_stay(ranks: RankPool, tmp_path: Path, layout: str) -> None:
    """Each layout has groups of its own, and each group threads: of many engines in one process none may stay."""
    stack = [{"mixer": "gated_retention", "layers": 2, "heads": 2}]
    config = under_layout(config_of(stack), parse_layout(layout)).model_dump(mode="json", exclude_none=True)
    job = "training:threads_after_training"
    counts = [ranks.run(job, 2, config=config, save=str(tmp_path / str(n))) for n in range(4)]
    assert counts[1:] == [counts[1]] * 3
