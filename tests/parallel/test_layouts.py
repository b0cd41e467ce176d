"""Every layout computes the same training step as one process."""

from __future__ import annotations

from itertools import combinations, product
from statistics import median
from typing import Any

import pytest
from stacks import MIXERS, hybrid, stack_of
from training import config_of

from trine.configs.layouts import parse_layout, under_layout
from trine.launch.pool import RankPool
from trine.pretrain.parity import StepsOfRank
from trine.pretrain.parity_comparison import compare
from trine.pretrain.parity_pieces import whole

pytestmark = pytest.mark.timeout(300)

STEPS = 3

MATRIX: list[tuple[str, str, bool]] = [
    ("attention", "recompute", False),
    ("attention", "cp4+recompute", False),
    ("attention", "tp2+sp+pp2+cp2", True),
    ("attention", "tp2+pp2+vpp2+dp2+selective", True),
    ("attention", "pp4+cp2+a2a", False),
    ("sliding_window", "pp2+vpp2+cp2", False),
    ("sliding_window", "tp2+sp+cp2+a2a+dp2+recompute", False),
    ("sliding_window", "pp2+cp4+recompute", True),
    ("sliding_window", "tp2+pp4+selective", False),
    ("differential", "tp2+cp2+a2a", False),
    ("differential", "tp2+sp+pp2+vpp2+recompute", True),
    ("differential", "pp4+selective", True),
    ("differential", "pp2+cp2+dp2+selective", True),
    ("differential", "tp2+sp+cp4+recompute", True),
    ("differential_v2", "tp2+dp2+selective", False),
    ("differential_v2", "tp2+sp+pp2+vpp2+cp2+a2a", True),
    ("differential_v2", "pp4+cp2+recompute", False),
    ("differential_v2", "pp2+cp4+recompute", True),
    ("retention", "pp2+vpp2+cp2", False),
    ("retention", "tp2+sp+pp4+selective", True),
    ("retention", "cp4+dp2", False),
    ("retention", "tp2+pp2+cp2+a2a+recompute", False),
    ("gated_retention", "cp2", False),
    ("gated_retention", "tp2+sp+pp2+recompute", True),
    ("gated_retention", "pp4+selective", True),
    ("gated_retention", "tp2+cp4+selective", True),
    ("gated_retention", "pp2+vpp2+cp2+a2a+dp2+selective", False),
    ("cross_attention", "pp2+cp2+a2a+recompute", True),
    ("cross_attention", "tp2+pp2+vpp2+cp2+recompute", False),
    ("cross_attention", "pp4+dp2", False),
    ("cross_attention", "tp2+sp+cp4+selective", True),
    ("differential_cross_attention", "tp2+sp+cp2+recompute", True),
    ("differential_cross_attention", "tp2+pp2+dp2", False),
    ("differential_cross_attention", "pp4+cp2+a2a+selective", True),
    ("differential_cross_attention", "pp2+vpp2+cp4+recompute", True),
]
"""(mixer, layout, documents kept apart), such that every two choices that fit eight ranks meet in some row."""

CHOICES: list[tuple[str, ...]] = [
    ("", "tp2", "tp2+sp"),
    ("", "pp2", "pp2+vpp2", "pp4"),
    ("", "cp2", "cp2+a2a", "cp4"),
    ("", "dp2"),
    ("", "selective", "recompute"),
]

HYBRID_LAYOUTS = [
    "tp2",
    "tp2+sp",
    "pp2+even",
    "pp2+vpp2",
    "pp4+vpp2",
    "cp2",
    "cp4",
    "cp4+a2a",
    "tp2+sp+pp2+vpp2+recompute",
    "tp2+sp+cp2+pp2",
    "tp2+sp+cp2+dp2+selective",
    "pp2+cp2+dp2",
]


_references: dict[str, StepsOfRank] = {}


def run(ranks: RankPool, stack: list[dict[str, Any]], layout: str, **sections: Any) -> list[StepsOfRank]:
    named = parse_layout(layout)
    config = under_layout(config_of(stack, **sections), named).model_dump(mode="json", exclude_none=True)
    return ranks.run("training:train", named.world_size, config=config, steps=STEPS)


def reference(ranks: RankPool, name: str, stack: list[dict[str, Any]], **sections: Any) -> StepsOfRank:
    if name not in _references:
        (_references[name],) = run(ranks, stack, "tp1", **sections)
    return _references[name]


def assert_same_training(found: list[StepsOfRank], expected: StepsOfRank) -> None:
    comparison = compare(expected, found, small_gradient=0.0)
    assert not comparison.excess, comparison


@pytest.mark.parametrize(("mixer", "layout", "masked"), MATRIX)
def test_mixer(ranks: RankPool, mixer: str, layout: str, masked: bool) -> None:
    train = {"document_masking": masked}
    expected = reference(ranks, f"{mixer} {masked}", stack_of(mixer), train=train)
    assert_same_training(run(ranks, stack_of(mixer), layout, train=train), expected)


def choices(mixer: str, layout: str, masked: bool) -> tuple[str, ...]:
    """What a row chooses: the mixer, one of each of ``CHOICES``, the mask."""
    parts = set(layout.split("+")) - {"tp1"}
    chosen = [max((c for c in group if set(filter(None, c.split("+"))) <= parts), key=len) for group in CHOICES]
    assert set("+".join(filter(None, chosen)).split("+")) - {""} == parts
    return (mixer, *chosen, str(masked))


def test_every_two_choices_meet_in_the_matrix() -> None:
    possible = [
        row
        for row in product(MIXERS, *CHOICES, ("False", "True"))
        if parse_layout("+".join(filter(None, row[1:-1])) or "tp1").world_size <= 8
    ]
    met = {pair for row in MATRIX for pair in combinations(enumerate(choices(*row)), 2)}
    assert {pair for row in possible for pair in combinations(enumerate(row), 2)} == met


@pytest.mark.parametrize("layout", HYBRID_LAYOUTS)
def test_hybrid_of_all_mixers(ranks: RankPool, layout: str) -> None:
    train = {"document_masking": True}
    assert_same_training(
        run(ranks, hybrid(), layout, train=train), reference(ranks, "hybrid", hybrid(), train=train)
    )


@pytest.mark.parametrize("layout", ["pp2", "pp2+vpp2", "tp2+sp+pp2", "cp2+pp2", "tp2+pp2+dp2"])
def test_tied_embeddings(ranks: RankPool, layout: str) -> None:
    stack = stack_of("retention")
    model = {"tied_embeddings": True, "embedding_scale": True}
    expected = reference(ranks, "tied", stack, model=model)
    assert_same_training(run(ranks, stack, layout, model=model), expected)


@pytest.mark.parametrize("split", [(1, 7), (5, 3), (7, 1)])
def test_uneven_pipeline_splits(ranks: RankPool, split: tuple[int, int]) -> None:
    """Boundaries before and after the shared K,V is made, and in front of the last layer."""
    train = {"document_masking": True}
    expected = reference(ranks, "hybrid", hybrid(), train=train)
    parallel = {"pipeline": 2, "pipeline_split": split}
    config = config_of(hybrid(), train=train, parallel=parallel).model_dump(mode="json", exclude_none=True)
    assert_same_training(ranks.run("training:train", 2, config=config, steps=STEPS), expected)


@pytest.mark.parametrize("layout", ["tp1", "cp4", "tp2+sp+pp2+cp2"])
def test_bf16_stays_near_fp32(ranks: RankPool, layout: str) -> None:
    """bf16 has eight bits: losses agree to a few thousandths and gradients, in the median, to a few hundredths.

    A gradient that lacks the part of another rank shows in the median as tenths.
    """
    train = {"document_masking": True}
    expected = reference(ranks, "hybrid", hybrid(), train=train)
    found = run(ranks, hybrid(), layout, train=train, precision={"compute": "bf16"})
    assert found[0]["losses"] == pytest.approx(expected["losses"], rel=5e-3)
    assert found[0]["grad_norms"] == pytest.approx(expected["grad_norms"], rel=2e-2)
    ours, theirs = whole(found, "gradients"), whole([expected], "gradients")
    differences = [((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs]
    assert median(differences) < 0.08
