"""A layout's name says how many ranks it takes, what it sets, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import permutations
from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trine.configs.checks import check_layout
from trine.configs.errors import UsageError
from trine.configs.layouts import NamedLayout, parse_layout, parse_layouts, under_layout
from trine.configs.schema import Config, Parallel

Load = Callable[..., Config]

SIZES = {"tp": "tensor", "pp": "pipeline", "vpp": "virtual_pipeline", "cp": "context"}
FLAGS: dict[str, tuple[str, Any]] = {
    "sp": ("sequence", True),
    "a2a": ("context_exchange", "all_to_all"),
    "even": ("pipeline_split", "even"),
}
RECOMPUTE = {"selective": "selective", "recompute": "full"}
PARTS = "tpN, ppN, vppN, cpN, dpN, zeroN, sp, a2a, even, selective, recompute, offload"

MISTAKES = {
    "tp2+foo": f"layout 'tp2+foo': 'foo' is not one of {PARTS}",
    "selectiv": f"layout 'selectiv': 'selectiv' is not one of {PARTS}; did you mean selective?",
    "TP2": f"layout 'TP2': 'TP2' is not one of {PARTS}; did you mean tpN?",
    "pp": f"layout 'pp': 'pp' is not one of {PARTS}; did you mean ppN?",
    "tp2+sp2": f"layout 'tp2+sp2': 'sp2' is not one of {PARTS}; did you mean sp?",
    "tp2+": "layout 'tp2+' has an empty part: join parts by + and layouts by commas, as in tp2+sp,cp2",
    "": "layout '' has an empty part: join parts by + and layouts by commas, as in tp2+sp,cp2",
    "tp1.5": f"layout 'tp1.5': 'tp1.5' is not one of {PARTS}; did you mean tpN?",
    "cp0": "layout 'cp0' has the part cp0, which must be cp1 or more",
    "dp-2": "layout 'dp-2' has the part dp-2, which must be dp1 or more",
    "tp2+tp4": "layout 'tp2+tp4' sets parallel.tensor by tp2 and again by tp4: keep one of them",
    "sp+tp2+sp": "layout 'sp+tp2+sp' sets parallel.sequence by sp and again by sp: keep one of them",
    "zero-1": "layout 'zero-1' has the part zero-1, which must be zero0 or more",
    "dp2+zero4": "layout 'dp2+zero4' has the part zero4, which must be zero3 or less",
    "dp2 + dp2": "layout 'dp2 + dp2' sets data by dp2 and again by dp2: keep one of them",
    "recompute+selective": "layout 'recompute+selective' sets train.recompute by recompute and again by selective: "
    "keep one of them",
}


@st.composite
def described_layouts(draw: st.DrawFn) -> tuple[list[str], NamedLayout]:
    """The parts of a name, shuffled, and the layout that they describe."""
    kinds = draw(st.lists(st.sampled_from([*SIZES, "dp"]), unique=True))
    sizes = {kind: draw(st.integers(1, 64)) for kind in kinds}
    flags = draw(st.lists(st.sampled_from(list(FLAGS)), unique=True))
    needs = {"a2a": "cp", "even": "pp"}
    flags = [flag for flag in flags if flag not in needs or sizes.get(needs[flag], 1) > 1]
    ways = draw(st.lists(st.sampled_from(list(RECOMPUTE)), max_size=1))
    stage = draw(st.none() | st.integers(0, 3))
    zero = [] if stage is None else [f"zero{stage}"]
    parts = [*(f"{kind}{size}" for kind, size in sizes.items()), *flags, *ways, *zero] or ["tp1"]
    parallel = {SIZES[kind]: size for kind, size in sizes.items() if kind in SIZES}
    parallel |= dict(FLAGS[flag] for flag in flags)
    layout = NamedLayout(
        name="+".join(parts),
        world_size=prod(size for kind, size in sizes.items() if kind != "vpp"),
        data=sizes.get("dp", 1),
        parallel={"tensor": 1} if parts == ["tp1"] else parallel,
        train={"recompute": RECOMPUTE[ways[0]]} if ways else {},
        zero={} if stage is None else {"stage": stage},
    )
    return draw(st.permutations(parts)), layout


@given(described_layouts())
def test_a_name_in_any_order_says_all_that_it_describes(described: tuple[list[str], NamedLayout]) -> None:
    parts, layout = described
    name = "+".join(parts)
    assert parse_layout(name) == layout
    assert parse_layout(name).name == name
    assert parse_layouts(name) == (layout,)


@pytest.mark.parametrize(("name", "lacks"), [("a2a", "cpN"), ("tp2+a2a+cp1", "cpN"), ("even+cp2", "ppN"), ("dp2+offload", "zeroN")])
def test_a_part_that_says_nothing_is_refused(name: str, lacks: str) -> None:
    with pytest.raises(UsageError, match=rf"^layout '{re.escape(name)}' has the part .* nothing without {lacks}: add"):
        parse_layout(name)


def test_different_layouts_are_unequal() -> None:
    names = ["tp1", "tp2", "pp2", "dp2", "tp2+sp", "cp2", "cp2+a2a", "recompute", "selective", "zero0", "zero1", "zero1+offload"]
    for one, other in permutations(names, 2):
        assert parse_layout(one) != parse_layout(other)


def test_a_layout_with_every_kind_of_part() -> None:
    layout = parse_layout("tp2 + sp+pp3+vpp2+even+cp4+a2a+dp5+selective")
    assert layout.world_size == 2 * 3 * 4 * 5
    assert layout.data == 5
    assert layout.parallel == {
        "tensor": 2,
        "sequence": True,
        "pipeline": 3,
        "virtual_pipeline": 2,
        "pipeline_split": "even",
        "context": 4,
        "context_exchange": "all_to_all",
    }
    assert layout.train == {"recompute": "selective"}


def test_several_layouts_come_in_their_order() -> None:
    layouts = parse_layouts("tp2+sp, dp2,cp4")
    assert [layout.name for layout in layouts] == ["tp2+sp", "dp2", "cp4"]
    assert [layout.world_size for layout in layouts] == [2, 2, 4]


@pytest.mark.parametrize(("name", "sentence"), MISTAKES.items())
def test_a_mistaken_name(name: str, sentence: str) -> None:
    for parse in (parse_layout, parse_layouts):
        with pytest.raises(UsageError) as caught:
            parse(name)
        assert str(caught.value) == sentence


def test_a_layout_replaces_that_of_the_configuration(load: Load) -> None:
    config = load(
        "parallel={tensor: 4, sequence: true, pipeline: 2, virtual_pipeline: 2, pipeline_split: even}",
        "train.recompute=full",
        "train.document_masking=true",
    )
    placed = under_layout(config, parse_layout("pp2+selective"))
    assert placed.parallel == Parallel(pipeline=2)
    assert placed.train == config.train.model_copy(update={"recompute": "selective"})
    reference = under_layout(config, parse_layout("tp1"))
    assert reference.parallel == Parallel()
    assert reference.train.recompute == "none"
    assert reference.train.document_masking is True
    unplaced = {"parallel", "train"}
    assert placed.model_dump(exclude=unplaced) == config.model_dump(exclude=unplaced)


@pytest.mark.parametrize(
    "name", ["tp1", "tp2+sp", "pp2+vpp2", "tp2+pp2+dp2", "cp4", "tp2+sp+cp2+recompute", "pp3", "cp2+a2a", "pp4+even", "zero0", "tp2+sp+dp2+zero3+offload"]
)
def test_a_placed_configuration_is_one_that_could_have_been_written(load: Load, name: str) -> None:
    layout = parse_layout(name)
    placed = under_layout(load(), layout)
    assert Config.model_validate(placed.model_dump()) == placed
    assert check_layout(placed, layout.world_size).data == layout.data
