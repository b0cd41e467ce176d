"""DeepSpeed's engine trains what Megatron-Core's does, and each continues the other's run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stacks import hybrid
from training import config_of

from trine.configs.layouts import parse_layout, under_layout
from trine.launch.pool import RankPool
from trine.pretrain.checkpoints import folder
from trine.pretrain.parity import StepsOfRank
from trine.pretrain.parity_comparison import compare
from trine.pretrain.parity_pieces import whole

pytestmark = pytest.mark.timeout(300)

STEPS = 3

LAYOUTS = [
    "dp2+zero0",
    "dp2+zero1",
    "dp2+zero2",
    "dp2+zero3",
    "tp2+sp+dp2+zero1",
    "tp2+sp+dp2+zero2",
    "tp2+sp+dp2+zero3",
    "cp2+dp2+zero2",
    "dp3+zero1+offload",
    "tp2+sp+cp2+zero3+offload+recompute",
]


def raw_config(layout: str, **sections: Any) -> dict[str, Any]:
    sections["train"] = {"document_masking": True, "global_batch_size": 12} | sections.get("train", {})
    config = config_of(hybrid(), optimizer={"schedule": "cosine", "clip_grad": 0.5}, **sections)
    return under_layout(config, parse_layout(layout)).model_dump(mode="json", exclude_none=True)


def run(ranks: RankPool, raw: dict[str, Any], layout: str, job: str = "training:train", **arguments: Any) -> Any:
    return ranks.run(job, parse_layout(layout).world_size, config=raw, **{"steps": STEPS, **arguments})


@pytest.fixture(scope="module")
def reference(ranks: RankPool) -> StepsOfRank:
    (found,) = run(ranks, raw_config("tp1"), "tp1", steps=len(CHAIN))
    return found


@pytest.fixture(scope="module")
def three_steps(ranks: RankPool) -> StepsOfRank:
    (found,) = run(ranks, raw_config("tp1"), "tp1")
    assert min(found["grad_norms"]) > 0.5  # so that gradients are clipped
    return found


def assert_same(found: list[StepsOfRank], expected: StepsOfRank) -> None:
    comparison = compare(expected, found, small_gradient=0.0)
    assert not comparison.excess, comparison
    assert found[0]["learning_rates"] == expected["learning_rates"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_training(ranks: RankPool, three_steps: StepsOfRank, layout: str) -> None:
    assert_same(run(ranks, raw_config(layout), layout), three_steps)


def test_no_parameter_is_too_small_to_be_divided(ranks: RankPool, three_steps: StepsOfRank) -> None:
    """By default stage 3 keeps what has fewer than 100,000 elements, here everything, whole between steps."""
    raw = raw_config("dp3+zero3")
    zero = raw["deepspeed"]["zero_optimization"]
    zero |= {"stage3_param_persistence_threshold": 0, "offload_param": {"device": "cpu"}}
    assert_same(run(ranks, raw, "dp3+zero3"), three_steps)


SETTINGS: dict[str, dict[str, Any]] = {
    "dp3+zero1": {"round_robin_gradients": True},
    "dp2+zero2+offload": {"round_robin_gradients": True, "reduce_bucket_size": 300},
    "tp2+dp2+zero2": {"overlap_comm": True, "contiguous_gradients": False, "allgather_bucket_size": 500},
    "dp2+zero3": {"sub_group_size": 500, "stage3_prefetch_bucket_size": 100, "reduce_bucket_size": 10_000},
}


@pytest.mark.parametrize(("layout", "settings"), SETTINGS.items())
def test_settings_change_no_number(
    ranks: RankPool, three_steps: StepsOfRank, tmp_path: Path, layout: str, settings: dict[str, Any]
) -> None:
    """Some change the order in which parameters lie in memory, of which a checkpoint and its reader know nothing."""
    raw = raw_config(layout)
    raw["deepspeed"]["zero_optimization"] |= settings
    assert_same(run(ranks, raw, layout, save=str(tmp_path)), three_steps)
    (loaded,) = run(ranks, raw_config("tp1"), "tp1", steps=0, load=str(tmp_path))
    ours, theirs = whole([loaded], "parameters"), whole([three_steps], "parameters")
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


CHAIN = ["dp3+zero1", "tp2+sp+pp2", "tp2+dp2+zero3", "zero0", "tp2+sp+dp3+zero2+offload", "tp1"]


def test_a_run_that_changes_its_engine_at_every_step(
    ranks: RankPool, reference: StepsOfRank, tmp_path: Path
) -> None:
    """Weights, moments, step counts and the schedule pass between engines, stages and numbers of data ranks.

    Losses and norms within 1e-5 of the run that never stopped: fp32 sums in another order.
    """
    losses, norms, rates = [], [], []
    for layout in CHAIN:
        load = folder.newest(tmp_path)
        found = run(
            ranks, raw_config(layout), layout, steps=1, load=load and str(tmp_path), save=str(tmp_path)
        )
        losses += found[0]["losses"]
        norms += found[0]["grad_norms"]
        rates += found[0]["learning_rates"]
    assert losses == pytest.approx(reference["losses"], rel=1e-5)
    assert norms == pytest.approx(reference["grad_norms"], rel=1e-5)
    assert rates == reference["learning_rates"]
    ours, theirs = whole(found, "parameters"), whole([reference], "parameters")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


@pytest.mark.parametrize("stage", [2, 3])
def test_bf16(ranks: RankPool, tmp_path: Path, stage: int) -> None:
    """Each engine rounds gradients to bf16 in other places, and stage 3 has its vectors in bf16: losses agree as they do
    between layouts in bf16.

    Master copies are in fp32: a resumed run, of either engine, is the same to the last bit of what the file holds.
    """
    layout, precision = f"dp2+zero{stage}", {"compute": "bf16"}
    expected = run(ranks, raw_config("dp2", precision=precision), "dp2")
    raw = raw_config(layout, precision=precision)
    found = run(ranks, raw, layout)
    assert found[0]["losses"] == pytest.approx(expected[0]["losses"], rel=5e-3)
    assert found[0]["grad_norms"] == pytest.approx(expected[0]["grad_norms"], rel=2e-2)
    run(ranks, raw, layout, steps=2, save=str(tmp_path))
    resumed = run(ranks, raw, layout, steps=1, load=str(tmp_path))
    assert resumed[0]["losses"] == found[0]["losses"][2:]
    assert resumed[0]["grad_norms"] == found[0]["grad_norms"][2:]
    other = run(ranks, raw_config("tp2", precision=precision), "tp2", steps=1, load=str(tmp_path))
    assert other[0]["losses"] == pytest.approx(found[0]["losses"][2:], rel=5e-3)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_skipped_update_leaves_no_trace(ranks: RankPool, three_steps: StepsOfRank, stage: int) -> None:
    layout = f"dp2+zero{stage}"
    found = run(ranks, raw_config(layout), layout, "training:train_after_a_skipped_step")
    assert_same(found, three_steps)


def test_memory_falls_with_the_stage(ranks: RankPool) -> None:
    """On 4 data ranks, in fp32, per element, between two microbatches: stage 0 holds 4 bytes of parameter, 4 of gradient
    and 8 of moments. Stage 1 has a fourth of the moments and of the master copies; stage 2 of gradients, too; stage 3
    of parameters, too."""
    held = []
    for stage in range(4):
        layout = f"dp4+zero{stage}"
        raw = raw_config(layout, train={"global_batch_size": 16})
        buckets = {"reduce_bucket_size": 2000} if stage else {}
        alone = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0} if stage == 3 else {}
        raw["deepspeed"]["zero_optimization"] |= buckets | alone
        held.append(max(run(ranks, raw, layout, "memory:held_within_a_step")))
    expected = [16, 4 + 4 + 12 / 4, 4 + 16 / 4, 20 / 4]
    assert held == pytest.approx(expected, rel=0.15)
