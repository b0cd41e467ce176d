"""Numbers that go wrong on one rank: all ranks do the same about them, and what is left is a run as it should be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import config_of

from trine.configs.schema import Watch
from trine.launch.pool import RankPool
from trine.pretrain.watch.judge import Judge
from trine.pretrain.watch.stragglers import Stragglers

pytestmark = pytest.mark.timeout(240)

STACK = [{"mixer": "gated_retention", "layers": 1, "heads": 2}, {"mixer": "differential", "layers": 1, "heads": 2}]
BATCH = 4

Run = Callable[..., tuple[str, list[str]]]


def run_config(data: Path, directory: Path, **sections: Any) -> dict[str, Any]:
    """Ten steps of 4 samples on two data ranks."""
    config = config_of(
        STACK,
        model={"vocabulary_size": None},
        train={"steps": 10, "global_batch_size": BATCH, "micro_batch_size": 1, "sequence_length": 32}
        | sections.pop("train", {}),
        data={"directory": str(data), "record_samples": True},
        evaluation=sections.pop("evaluation", {"interval": 0}),
        checkpoint={"interval": 3, "keep": 9},
        run={"directory": str(directory)},
        **sections,
    )
    return config.model_dump(mode="json", exclude_none=True)


@pytest.fixture
def faulty(ranks: RankPool, data: Path, tmp_path: Path) -> Run:
    """A run of two ranks of which the second has faulty gradients; what both said, and rank 0's warnings."""

    def run(name: str, *, at: list[int], factor: float = math.nan, times: int = 99, **sections: Any) -> Any:
        config = run_config(data, tmp_path / name, **sections)
        told = ranks.run("running:faulty", 2, config=config, at=at, factor=factor, times=times)
        assert told[0][0] == told[1][0]
        return told[0]

    return run


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run / "metrics.jsonl") if "loss" in line]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in lines(run / "events.jsonl") if line["event"] == name]


def samples(run: Path) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for path in sorted((run / "samples").glob("rank-*.jsonl")):
        for record in lines(path):
            found.setdefault(record["step"], []).extend(record["samples"])
    return found


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(
    faulty: Run, ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    """Step 4 changes no parameter; what follows is as if its samples had not been there."""
    at_step = []
    for last in (3, 4):
        outcome, warnings = faulty("run", at=[3 * BATCH], train={"steps": last})
        assert outcome == "finished"
        at_step.append(ranks.run("running:parameters", 2, config=run_config(data, tmp_path / "run"))[0])
    assert all(torch.equal(a, b) for a, b in zip(*at_step, strict=True))
    assert "step 4 skipped: loss" in warnings[-1]
    outcome, _ = faulty("run", at=[3 * BATCH], train={"steps": 10})
    assert outcome == "finished"
    found = steps(tmp_path / "run")
    assert [m["step"] for m in found] == list(range(1, 11))
    assert [m["skipped"] for m in found] == [n == 4 for n in range(1, 11)]
    assert [m["grad_norm"] is None for m in found] == [n == 4 for n in range(1, 11)]
    (event,) = events(tmp_path / "run", "skipped")
    assert (event["step"], event["after_samples"]) == (4, 3 * BATCH)
    assert event["samples"] == samples(tmp_path / "run")[4]
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert board.Scalars("resilience/skipped_steps")[-1].value == 1


def test_a_fault_that_does_not_repeat_changes_nothing(faulty: Run, tmp_path: Path) -> None:
    """The step is computed a second time from the same samples, and the run is the one without the fault."""
    faulty("whole", at=[])
    outcome, warnings = faulty("run", at=[5 * BATCH], times=1)
    assert outcome == "finished"
    assert "step 6 gave loss" in warnings[0]
    assert "suspect a device" in warnings[0]
    ours, theirs = steps(tmp_path / "run"), steps(tmp_path / "whole")
    assert [(m["loss"], m["grad_norm"]) for m in ours] == [(m["loss"], m["grad_norm"]) for m in theirs]
    assert samples(tmp_path / "run") == samples(tmp_path / "whole")
    assert events(tmp_path / "run", "not reproduced")[0]["step"] == 6


def test_a_run_stops_where_asked_and_keeps_the_checkpoints_before(faulty: Run, tmp_path: Path) -> None:
    outcome, _ = faulty("run", at=[7 * BATCH], watch={"on_nonfinite": "stop"})
    assert outcome.startswith("step 8: loss ")
    assert "are not finite: lower optimizer.learning_rate=0.001 or optimizer.clip_grad=1, or change watch" in outcome
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*[0-9]"))[-1] == "step-00000006"


def test_a_run_that_skips_too_often_stops(faulty: Run, tmp_path: Path) -> None:
    at = [n * BATCH for n in (2, 5, 6, 7)]
    outcome, _ = faulty("run", at=at, watch={"skip_budget": 3})
    assert outcome.startswith("step 8: ")
    assert "and 3 steps in a row were passed over (watch.skip_budget)" in outcome


def test_a_run_goes_back_and_leaves_out_the_samples(faulty: Run, tmp_path: Path) -> None:
    """At step 6 back to the checkpoint of step 3: the samples of steps 4, 5 and 6 are not trained on, and the run has
    all its steps, each at its learning rate. Begun again it reads on where it stood."""
    schedule = {"schedule": "cosine", "decay_steps": 14}
    faulty("whole", at=[], train={"steps": 14}, optimizer=schedule)
    watch = {"on_nonfinite": "roll_back"}
    outcome, warnings = faulty(
        "run", at=[5 * BATCH], watch=watch, evaluation={"interval": 3, "batches": 1}, optimizer=schedule
    )
    assert outcome == "finished"
    evaluated = [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl") if "validation_loss" in line]
    assert evaluated == [0, 3, 6, 9, 10]
    assert "back to step-00000003, and 12 samples are left out" in warnings[-1]
    outcome, _ = faulty("run", at=[], watch=watch, train={"steps": 11}, optimizer=schedule)
    assert outcome == "finished"
    rates = [[m["lr"] for m in steps(tmp_path / name)][:11] for name in ("run", "whole")]
    assert rates[0] == rates[1]
    whole, found = samples(tmp_path / "whole"), samples(tmp_path / "run")
    assert [found[step] for step in range(1, 4)] == [whole[step] for step in range(1, 4)]
    assert [found[step] for step in range(4, 12)] == [whole[step + 3] for step in range(4, 12)]
    assert [m["step"] for m in steps(tmp_path / "run")] == list(range(1, 12))
    (event,) = events(tmp_path / "run", "went back")
    assert (event["step"], event["to"], event["left_out"]) == (6, 3, [12, 24])
    assert steps(tmp_path / "run")[-1]["consumed_samples"] == 14 * BATCH


def test_a_way_back_survives_the_end_of_the_run(ranks: RankPool, faulty: Run, data: Path, tmp_path: Path) -> None:
    """Directly after it has gone back the run is stopped: the next one leaves out the same samples, and has counted."""
    faulty("whole", at=[], train={"steps": 10})
    config = run_config(data, tmp_path / "run", watch={"on_nonfinite": "roll_back", "roll_back_budget": 1})
    told = ranks.run("running:stopped_after_going_back", 2, config=config, at=[5 * BATCH])
    assert told == ["stopped", "stopped"]
    assert json.loads((tmp_path / "run" / "checkpoints" / "step-00000003" / "state.json").read_text())["run"][
        "progress"
    ] == {"step": 3, "samples": 6 * BATCH, "tokens": 3 * BATCH * 32}
    outcome, _ = faulty("run", at=[8 * BATCH], watch={"on_nonfinite": "roll_back", "roll_back_budget": 1})
    assert "the run went back 1 times" in outcome
    assert samples(tmp_path / "run")[4] == samples(tmp_path / "whole")[7]


def test_a_run_goes_back_only_so_often(faulty: Run) -> None:
    outcome, _ = faulty("run", at=[4 * BATCH, 6 * BATCH], watch={"on_nonfinite": "roll_back", "roll_back_budget": 1})
    assert "the run went back 1 times (watch.roll_back_budget)" in outcome


def test_a_run_without_a_checkpoint_cannot_go_back(faulty: Run) -> None:
    outcome, _ = faulty("run", at=[BATCH], watch={"on_nonfinite": "roll_back"})
    assert "there is no checkpoint to go back to: lower checkpoint.interval=3" in outcome


@pytest.mark.parametrize("action", ["accept", "skip"])
def test_a_spike_is_counted_or_skipped(faulty: Run, tmp_path: Path, action: str) -> None:
    watch = {"on_spike": action, "spike_window": 4}
    outcome, warnings = faulty("run", at=[6 * BATCH], factor=1e5, watch=watch)
    assert outcome == "finished"
    assert [m["skipped"] for m in steps(tmp_path / "run")] == [n == 7 and action == "skip" for n in range(1, 11)]
    name = {"accept": "spike", "skip": "skipped"}[action]
    assert f"step 7 {name}: gradient norm" in warnings[0]
    assert events(tmp_path / "run", name)[0]["step"] == 7


def test_a_slow_rank_is_named(ranks: RankPool, data: Path, tmp_path: Path) -> None:
    """The last of two data ranks takes 1.5 s more for its two microbatches, whose work takes some ten milliseconds, or
    hundreds where the machine has much else to do."""
    config = run_config(data, tmp_path, train={"steps": 4}, watch={"straggler_interval": 2})
    (outcome, warnings), _ = ranks.run("running:slow", 2, config=config, seconds=0.75)
    assert outcome == "finished"
    assert "step 4: rank 1 on host" in warnings[0]
    assert "is a straggler" in warnings[0]
    assert len(warnings) == 1
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("time/own_work_max")] == [2, 4]
    assert {e.value for e in board.Scalars("resilience/slowest_rank")} == {1.0}


def test_a_straggler_is_named_once_and_when_it_recovers(caplog: pytest.LogCaptureFixture) -> None:
    stragglers = Stragglers(1.5, ["a", "b", "c", "d"])
    for step, slow in enumerate([0.1, 0.3, 0.1, 0.3, 0.3, 0.3, 0.1], start=1):
        stragglers.see(step, [0.1, 0.11, slow, 0.1])
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["step 5", "step 7"]
    assert "rank 2 on host c" in caplog.records[0].getMessage()
    # Twice nothing is nothing.
    caplog.clear()
    for step in range(3):
        stragglers.see(step, [0.001, 0.001, 0.004, 0.001])
    assert not caplog.records


def test_the_judge_survives_a_checkpoint() -> None:
    """Restored from JSON it judges as the one that went on."""
    settings = Watch(on_spike="skip", spike_window=4, skip_budget=3)
    judge = Judge(settings)
    losses = [2.0, 2.1, 1.9, 2.05]
    for loss in losses:
        assert judge.judge(loss, 1.0).action == "accept"
    assert judge.judge(9.0, 1.0).action == "skip"
    other = Judge(settings)
    other.restore(json.loads(json.dumps(judge.state())))
    assert other.counters() == judge.counters() == {
        "resilience/skipped_steps": 1.0, "resilience/spikes": 1.0, "resilience/roll_backs": 0.0
    }  # fmt: skip
    for one in (judge, other):
        assert [one.judge(loss, 1.0).action for loss in (9.0, 2.1, 9.0, 9.0, 9.0)] == [
            "skip", "accept", "skip", "skip", "stop"
        ]  # fmt: skip


def test_no_spike_is_found_before_the_window_is_full() -> None:
    judge = Judge(Watch(on_spike="stop", spike_window=4))
    assert [judge.judge(loss, 1.0).action for loss in (2.0, 50.0, 2.0, 2.0)] == ["accept"] * 4
    assert judge.judge(60.0, 1.0).action == "accept"  # the window has a 50 in it
    assert judge.judge(500.0, 1.0).action == "stop"
