"""What a run with FP8 reports: the gap to the same loss without, the backend, and no speed of an emulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import config_of

from trine.launch.pool import RankPool

pytestmark = pytest.mark.timeout(240)

STACK = [{"mixer": "gated_retention", "layers": 1, "heads": 2}, {"mixer": "differential", "layers": 1, "heads": 2}]


def run(ranks: RankPool, data: Path, directory: Path, fp8: dict[str, Any] | None, **sections: Any) -> list[dict[str, Any]]:
    """Four steps on two pipeline stages: what ``metrics.jsonl`` holds."""
    config = config_of(
        STACK,
        model={"vocabulary_size": None, "hidden_size": 32, "ffn_hidden_size": 64},
        train={"steps": 4, "global_batch_size": 4, "micro_batch_size": 1, "sequence_length": 32},
        data={"directory": str(data)},
        evaluation={"interval": 0},
        parallel={"pipeline": 2},
        precision={"compute": "bf16"} | ({} if fp8 is None else {"fp8": fp8}),
        run={"directory": str(directory)},
    )
    ranks.run("running:pretrain", 2, config=config.model_dump(mode="json", exclude_none=True))
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_the_gap_is_recorded_at_the_interval(ranks: RankPool, data: Path, tmp_path: Path) -> None:
    lines = run(ranks, data, tmp_path / "fp8", {"backend": "emulate", "recipe": "delayed", "shadow_interval": 2})
    gaps = {line["step"]: line for line in lines if "fp8-emulated/loss_gap" in line}
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert sorted(gaps) == [2, 4]
    for step, line in gaps.items():
        without = line["fp8-emulated/loss_without"]
        assert line["fp8-emulated/loss_gap"] == (losses[step] - without) / without
        assert 0 < abs(line["fp8-emulated/loss_gap"]) < 5e-3  # bf16's and 8-bit rounding of a small model
    board = EventAccumulator(str(tmp_path / "fp8" / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("fp8-emulated/loss_gap")] == [2, 4]
    assert "throughput" not in board.Tags()["scalars"]
    assert all(line["tflops_per_rank"] is None for line in lines if "loss" in line)


def test_looking_changes_nothing(ranks: RankPool, data: Path, tmp_path: Path) -> None:
    """The same losses, bit for bit, as a run that never looks."""
    found = [
        run(ranks, data, tmp_path / str(interval), {"backend": "scaled_mm", "shadow_interval": interval})
        for interval in (0, 1)
    ]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in found]
    assert losses[0] == losses[1]
    assert not any(key.startswith("fp8") for line in found[0] for key in line)
    assert sum("fp8/loss_gap" in line for line in found[1]) == 4
    assert all(line["tflops_per_rank"] > 0 for lines in found for line in lines if "loss" in line)


def test_without_fp8_there_is_no_gap(ranks: RankPool, data: Path, tmp_path: Path) -> None:
    lines = run(ranks, data, tmp_path / "plain", None)
    assert not any(key.startswith("fp8") for line in lines for key in line)


@pytest.mark.parametrize(
    ("fp8", "text"),
    [
        (None, "in bf16"),
        ({"backend": "te", "recipe": "delayed"}, "FP8, recipe delayed, backend te (Transformer Engine)"),
        (
            {"backend": "scaled_mm", "keep_first_last_bf16": 1},
            "FP8, recipe tensorwise, backend scaled_mm (torch's scaled_mm); the first and last layer in bf16",
        ),
        (
            {"backend": "scaled_mm", "keep_first_last_bf16": 2},
            "FP8, recipe tensorwise, backend scaled_mm (torch's scaled_mm); the first and last 2 layers in bf16",
        ),
        (
            {"backend": "emulate"},
            "FP8, recipe tensorwise, backend emulate (emulated: rounded to 8 bits and multiplied in fp32, slower than no "
            "FP8 and no measure of speed)",
        ),
    ],
)
def test_the_banner_names_backend_and_recipe(fp8: dict[str, Any] | None, text: str) -> None:
    from trine.pretrain.banner import _linear_maps

    config = config_of(STACK, precision={"compute": "bf16"} | ({} if fp8 is None else {"fp8": fp8}))
    assert _linear_maps(config) == text
