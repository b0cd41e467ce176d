"""Whichever kernels a model runs on, it takes the same training step."""

from __future__ import annotations

from typing import Any

import pytest
from training import config_of

from trine.configs.layouts import parse_layout, under_layout
from trine.launch.pool import RankPool
from trine.pretrain.parity import StepsOfRank
from trine.pretrain.parity_comparison import compare

pytestmark = pytest.mark.timeout(300)

STACK: list[dict[str, Any]] = [
    {"mixer": "attention", "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 8},
    {"mixer": "sliding_window", "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 8, "window": 9},
    {"mixer": "differential", "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 8},
    {"mixer": "differential_v2", "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 8},
    {"mixer": "retention", "layers": 1, "heads": 4, "head_dim": 8, "value_head_dim": 16},
    {"mixer": "gated_retention", "layers": 1, "heads": 4, "head_dim": 8},
    {"shared_kv": {"kv_heads": 4, "head_dim": 8}},
    {"mixer": "cross_attention", "layers": 1, "heads": 4},
    {"mixer": "differential_cross_attention", "layers": 1, "heads": 4},
]
"""Every mixer, at widths that all kernels take."""


def train(ranks: RankPool, backend: str, layout: str) -> list[StepsOfRank]:
    """One step; on a machine without a GPU ``triton`` is Triton's interpreter."""
    named = parse_layout(layout)
    sections: dict[str, Any] = {
        "kernels": {"backend": backend},
        "train": {"sequence_length": 40, "global_batch_size": 1, "micro_batch_size": 1, "document_masking": True},
    }
    config = under_layout(config_of(STACK, **sections), named).model_dump(mode="json", exclude_none=True)
    return ranks.run("training:train", named.world_size, config=config, steps=1)


@pytest.fixture(scope="module")
def expected(ranks: RankPool) -> StepsOfRank:
    (steps,) = train(ranks, "reference", "tp1")
    return steps


@pytest.mark.parametrize(("backend", "layout"), [("torch", "tp1"), ("triton", "tp1"), ("triton", "tp2+sp+cp2")])
def test_same_step(ranks: RankPool, expected: StepsOfRank, backend: str, layout: str) -> None:
    """Losses, gradients, their norm and the parameters after the step, within the rounding of fp32."""
    comparison = compare(expected, train(ranks, backend, layout), small_gradient=0.0)
    assert not comparison.excess, comparison
