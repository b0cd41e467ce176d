"""Where the stack is cut into pipeline chunks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trine.configs.schema import Config
from trine.configs.stack import expand
from trine.models.flops import head_flops, layer_flops
from trine.models.split import balanced_split, pipeline_split


def chunk_costs(costs: list[float], last: float, split: tuple[int, ...]) -> list[float]:
    found, first = [], 0
    for layers in split:
        found.append(sum(costs[first : first + layers]))
        first += layers
    found[-1] += last
    return found


def all_splits(layers: int, chunks: int) -> list[tuple[int, ...]]:
    cuts = [(0, *inner, layers) for inner in combinations(range(1, layers), chunks - 1)]
    return [tuple(b - a for a, b in pairwise(cut)) for cut in cuts]


@given(
    costs=st.lists(st.integers(1, 9).map(float), min_size=4, max_size=9),
    last=st.integers(0, 20).map(float),
    chunks=st.integers(1, 4),
)
def test_no_other_cut_has_a_cheaper_costliest_chunk(costs: list[float], last: float, chunks: int) -> None:
    split = balanced_split(costs, last, chunks)
    assert len(split) == chunks
    assert sum(split) == len(costs)
    assert min(split) >= 1
    others = [chunk_costs(costs, last, other) for other in all_splits(len(costs), chunks)]
    ours = chunk_costs(costs, last, split)
    assert max(ours) == min(map(max, others))
    squares = [sum(cost**2 for cost in other) for other in others if max(other) == max(ours)]
    assert sum(cost**2 for cost in ours) == min(squares)


def test_equal_layers_are_cut_evenly() -> None:
    assert balanced_split([2.0] * 8, 0.0, 4) == (2, 2, 2, 2)


def test_a_large_output_layer_leaves_fewer_layers_to_the_last_chunk() -> None:
    assert balanced_split([1.0] * 8, 2.0, 2) == (5, 3)


YOCO = [
    {"mixer": "gated_retention", "layers": 4, "heads": 4},
    {"shared_kv": {"kv_heads": 2, "head_dim": 16}},
    {"mixer": "cross_attention", "layers": 4, "heads": 4},
]


def config_with(config_for: Callable[..., Config], split: object, pipeline: int, virtual: int = 1) -> Config:
    config = config_for(hidden_size=64, ffn_hidden_size=32, sequence_length=16, stack=YOCO)
    parallel = {"pipeline": pipeline, "virtual_pipeline": virtual, "pipeline_split": split}
    return Config.model_validate(config.model_dump(mode="json") | {"parallel": parallel})


def test_cross_layers_are_counted_by_their_operations(config_for: Callable[..., Config]) -> None:
    """Their two products are fewer than gated retention's five, so the later chunk takes more of them."""
    config = config_with(config_for, "balanced", 2)
    plans = expand(config.model.stack)
    costs = [layer_flops(plan, config.model, 16) for plan in plans]
    assert costs[0] > 1.2 * costs[-1]
    assert costs[4] - costs[5] == 4 * 64 * 2 * 16  # the shared K,V is made just before the first cross layer
    first, second = pipeline_split(config)
    assert first < second
    best = min(max(chunk_costs(costs, head_flops(config.model), split)) for split in all_splits(8, 2))
    assert max(chunk_costs(costs, head_flops(config.model), (first, second))) == best


@pytest.mark.parametrize(("asked", "expected"), [("even", (2, 2, 2, 2)), ((1, 3, 3, 1), (1, 3, 3, 1))])
def test_splits_that_are_asked_for(config_for: Callable[..., Config], asked: object, expected: tuple[int, ...]) -> None:
    assert pipeline_split(config_with(config_for, asked, 2, 2)) == expected
