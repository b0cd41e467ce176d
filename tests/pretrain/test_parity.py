"""Parity's own arithmetic: pieces become whole tensors, every difference is seen, every layout has the same samples."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from training import config_of

from trine.configs.errors import RunError
from trine.configs.layouts import parse_layouts, under_layout
from trine.configs.schema import Config
from trine.launch.pool import RankPool
from trine.pretrain.parity import DEFAULT_VOCABULARY, DOCUMENTS, StepsOfRank, parity_config
from trine.pretrain.parity_comparison import SMALL_GRADIENT, compare
from trine.pretrain.parity_pieces import all_versions, whole

pytestmark = pytest.mark.timeout(180)

MATRIX = torch.arange(24.0).view(4, 6) + 1
VECTOR = torch.tensor([1.0, -2.0, 3.0])


def steps(pieces: list[Any]) -> StepsOfRank:
    return {
        "losses": [3.0, 2.0],
        "grad_norms": [1.0, 0.5],
        "learning_rates": [1e-3, 1e-3],
        "evaluation": 2.5,
        "gradients": copy.deepcopy(pieces),
        "parameters": copy.deepcopy(pieces),
    }


def reference() -> StepsOfRank:
    return steps([("matrix", (4, 6), 1, 0, 0, MATRIX.flatten()), ("vector", (3,), None, 0, 0, VECTOR.clone())])


def divided() -> list[StepsOfRank]:
    """Two tensor ranks that cut the matrix's columns and replicate the vector, two data ranks that cut each in two."""
    ranks = []
    for data_rank in range(2):
        for tensor_rank, columns in enumerate(MATRIX.chunk(2, dim=1)):
            matrix = columns.flatten()[6 * data_rank : 6 * (data_rank + 1)]
            vector = VECTOR[:1] if data_rank == 0 else VECTOR[1:]
            ranks.append(
                steps([
                    ("matrix", (4, 6), 1, tensor_rank, 6 * data_rank, matrix.clone()),
                    ("vector", (3,), None, tensor_rank, data_rank, vector.clone()),
                ])
            )  # fmt: skip
    return ranks


def test_pieces_of_all_ranks_make_the_whole() -> None:
    found = whole(divided(), "gradients")
    assert torch.equal(found["matrix"], MATRIX)
    assert torch.equal(found["vector"], VECTOR)
    held = all_versions([rank["gradients"] for rank in divided()])
    assert {name: len(versions) for name, versions in held.items()} == {"matrix": 1, "vector": 2}
    assert [version.tolist() for version in held["vector"]] == [VECTOR.tolist()] * 2


def test_equal_results_have_no_difference() -> None:
    found = compare(reference(), divided())
    assert (found.loss, found.grad_norm, found.gradient, found.parameter) == (0, 0, 0, 0)
    assert found.excess == ()


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize(("key", "attribute"), [("gradients", "gradient"), ("parameters", "parameter")])
@pytest.mark.parametrize(("piece", "name"), [(0, "matrix"), (1, "vector")])
def test_a_difference_in_any_piece_of_any_rank_is_seen(
    rank: int, key: str, attribute: str, piece: int, name: str
) -> None:
    """The vector's copies on both tensor ranks count, not the first alone."""
    found: list[Any] = divided()
    found[rank][key][piece][-1][-1] += 0.1
    comparison = compare(reference(), found)
    size = (MATRIX if name == "matrix" else VECTOR).norm().item()
    assert getattr(comparison, attribute) == pytest.approx(0.1 / size, rel=1e-4)
    assert getattr(comparison, f"{attribute}_name") == name
    assert comparison.excess == (attribute,)


@pytest.mark.parametrize("rank", range(4))
def test_numbers_of_every_rank_and_step_count(rank: int) -> None:
    found = divided()
    found[rank]["losses"][1] = 2.1
    assert compare(reference(), found).loss == pytest.approx(0.05)
    found = divided()
    found[rank]["evaluation"] = 2.0
    assert compare(reference(), found).loss == pytest.approx(0.2)
    found = divided()
    found[rank]["grad_norms"][1] = 0.505
    assert compare(reference(), found).grad_norm == pytest.approx(0.01)


def test_what_is_not_finite_or_not_there_differs_infinitely() -> None:
    found: list[Any] = divided()
    found[2]["losses"][0] = math.nan
    found[1]["gradients"][0][-1][0] = math.nan
    comparison = compare(reference(), found)
    assert comparison.loss == comparison.gradient == math.inf
    assert comparison.excess == ("loss", "gradient")
    without: list[Any] = [{**rank, "parameters": rank["parameters"][:1]} for rank in divided()]
    assert compare(reference(), without).parameter == math.inf
    assert compare(reference(), without).parameter_name == "vector"
    more: list[Any] = divided()
    more[0]["gradients"].append(("other", (1,), None, 0, 0, torch.ones(1)))
    assert compare(reference(), more).gradient_name == "other"


def test_a_zero_gradient_must_be_zero() -> None:
    zero = reference()
    zero["gradients"][1][-1].zero_()
    assert compare(zero, divided(), small_gradient=0.0).gradient == math.inf


def test_a_small_gradient_is_measured_against_a_part_of_all() -> None:
    """Rounding of what cancels in it is no fault, a part that is missing still is."""
    zero, found = reference(), divided()
    zero["gradients"][1][-1].zero_()
    length = float(reference()["gradients"][1][-1].norm())
    comparison = compare(zero, found)
    assert comparison.gradient_name == "vector"
    assert comparison.gradient == pytest.approx(length / (SMALL_GRADIENT * zero["grad_norms"][0]))
    assert comparison.excess == ("gradient",)


def test_elements_that_nobody_holds_are_a_failure() -> None:
    found: list[Any] = divided()
    found[3]["gradients"].pop(0)
    with pytest.raises(RunError, match="the ranks hold 6 of the 12 elements of matrix"):
        compare(reference(), found)


def small(**train: Any) -> Config:
    return config_of([{"mixer": "gated_retention", "layers": 2, "heads": 2}], train=train)


@pytest.mark.parametrize(
    ("names", "batch"),
    [("tp2", 4), ("dp2", 8), ("dp2,dp3", 12), ("dp2,dp6", 24), ("pp2+vpp2", 4), ("pp2+vpp2,dp2", 8), ("pp3+vpp2+dp2,tp2", 12)],
)
def test_every_layout_divides_the_batch_into_two_microbatches_or_more(names: str, batch: int) -> None:
    trained = parity_config(small(), parse_layouts(names), steps=7)
    assert trained.train.global_batch_size == batch
    assert trained.train.steps == 7


def test_parity_brings_its_own_numbers() -> None:
    base = config_of([{"mixer": "retention", "layers": 1, "heads": 2}], precision={"compute": "bf16"})
    unknown = base.model_copy(update={"model": base.model.model_copy(update={"vocabulary_size": None})})
    trained = parity_config(unknown, parse_layouts("tp2"), steps=1)
    assert trained.precision.compute == "fp32"
    assert trained.model.vocabulary_size == DEFAULT_VOCABULARY
    assert (trained.optimizer.schedule, trained.optimizer.warmup_steps) == ("constant", 0)


def synthetic(ranks: RankPool, layout: str, *, masking: bool) -> list[list[tuple[Any, ...]]]:
    (named,) = parse_layouts(layout)
    config = under_layout(small(document_masking=masking), named).model_dump(mode="json", exclude_none=True)
    return ranks.run("reading:synthetic", named.world_size, config=config, step=3)


def test_data_ranks_share_one_global_batch(ranks: RankPool) -> None:
    (alone,) = synthetic(ranks, "tp1", masking=True)
    divided = synthetic(ranks, "dp2", masking=True)
    assert [len(rank) for rank in divided] == [2, 2]
    for field in range(3):
        together = torch.cat([microbatch[field] for rank in divided for microbatch in rank])
        assert torch.equal(together, torch.cat([microbatch[field] for microbatch in alone]))


def test_synthetic_windows_hold_several_documents(ranks: RankPool) -> None:
    (alone,) = synthetic(ranks, "tp1", masking=True)
    tokens, labels, starts = (torch.cat(parts) for parts in zip(*alone, strict=True))
    assert torch.equal(tokens[:, 1:], labels[:, :-1])
    positions = torch.arange(starts.shape[1])
    assert ((starts == positions) | (starts == starts.roll(1, dims=1)))[:, 1:].all()
    assert (starts <= positions).all()
    assert all(DOCUMENTS - 1 <= len(row.unique()) <= DOCUMENTS for row in starts)
    assert len({tuple(row.tolist()) for row in starts}) == len(starts)
    (plain,) = synthetic(ranks, "tp1", masking=False)
    assert all(microbatch[2] is None for microbatch in plain)
    assert torch.equal(torch.cat([microbatch[0] for microbatch in plain]), tokens)
