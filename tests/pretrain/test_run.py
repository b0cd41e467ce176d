"""A whole run from the command line: what it writes, how it resumes, how it ends when a rank is killed."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trine.data_pipeline.preparation.prepare import prepare

pytestmark = pytest.mark.timeout(300)

STEPS = 8
END_SECONDS = 30


def test_run_directory(finished: tuple[Path, str], metrics_of: Any) -> None:
    directory, printed = finished
    steps, evaluations = metrics_of(directory)
    assert [m["step"] for m in steps] == list(range(1, STEPS + 1))
    assert steps[0].keys() >= {
        "step", "loss", "grad_norm", "lr", "tokens", "consumed_samples", "step_time_s", "tokens_per_s"
    }  # fmt: skip
    assert steps[-1]["consumed_samples"] == STEPS * 4
    assert steps[-1]["tokens"] == STEPS * 4 * 32
    assert [m["step"] for m in evaluations] == [0, 4, 8]
    assert evaluations[0]["validation_loss"] == pytest.approx(math.log(300), abs=0.5)
    assert evaluations[-1]["validation_loss"] < evaluations[0]["validation_loss"] - 0.3
    resolved = yaml.safe_load((directory / "config.yaml").read_text())
    assert resolved["model"]["vocabulary_size"] == 300
    checkpoints = sorted(p.name for p in (directory / "checkpoints").iterdir())
    assert checkpoints == ["step-00000003", "step-00000006", "step-00000008"]
    assert {p.name for p in (directory / "logs").iterdir()} >= {"rank-0.log", "rank-1.log"}
    for told in ("pipeline 2", "CPU with gloo", "kernels", "validation loss", "finished: 8 steps", str(directory)):
        assert told in printed


def test_tensorboard(finished: tuple[Path, str]) -> None:
    events = EventAccumulator(str(finished[0] / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {
        "lm loss", "learning-rate", "grad-norm", "batch-size", "iteration-time",
        "lm loss validation", "lm loss validation ppl", "train/tokens_seen", "perf/tokens_per_sec",
    }  # fmt: skip
    assert [e.step for e in events.Scalars("lm loss")] == list(range(1, STEPS + 1))
    assert over_samples(finished[0]) == [4 * n for n in range(1, STEPS + 1)]
    assert "config/text_summary" in events.Tags()["tensors"]


def over_samples(run: Path) -> list[int]:
    events = EventAccumulator(str(run / "tensorboard" / "samples")).Reload()
    return [e.step for e in events.Scalars("lm loss vs samples")]


def test_same_command_again_does_nothing(finished: tuple[Path, str], trine: Any, recipe: Path, metrics_of: Any) -> None:
    directory, _ = finished
    before = metrics_of(directory)
    again = trine("pretrain", recipe, f"run.directory={directory}")
    assert again.returncode == 0, again.stderr
    assert "all 8 steps were done before; raise train.steps" in again.stderr
    assert metrics_of(directory) == before


def test_lambda_of_each_differential_layer_is_recorded(
    trine: Any, recipe: Path, tmp_path: Path, metrics_of: Any
) -> None:
    done = trine("pretrain", recipe, f"run.directory={tmp_path}", "train.steps=10", "evaluation.interval=0")
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [t for t in events.Tags()["scalars"] if t.startswith("diff/")] == ["diff/lambda/layer_03"]
    (value,) = events.Scalars("diff/lambda/layer_03")
    assert value.step == 10
    assert value.value == pytest.approx(0.556, abs=0.4)
    assert metrics_of(tmp_path)[1] == []


def test_killed_rank_ends_the_run_and_resume_is_exact(
    finished: tuple[Path, str],
    command: Any,
    environment: Any,
    recipe: Path,
    tmp_path: Path,
    metrics_of: Any,
    trine: Any,
) -> None:
    """Rank 1 dies by SIGKILL after the checkpoint of step 3; all ranks end, and the rest of the run is unchanged."""
    arguments = ["pretrain", recipe, f"run.directory={tmp_path}", "train.steps=100000"]
    with subprocess.Popen(
        command(*arguments), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment()
    ) as launcher:
        wait_for(lambda: last_step(tmp_path, metrics_of) >= 4)
        ranks = ranks_of(launcher.pid)
        assert len(ranks) == 2
        ranks[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        _, printed = launcher.communicate(timeout=END_SECONDS)
        assert time.monotonic() - killed < END_SECONDS
    assert launcher.returncode == 1
    assert "rank 1" in printed.strip().splitlines()[-1] + printed.strip().splitlines()[-2]
    assert "SIGKILL" in printed
    psutil.wait_procs(list(ranks.values()), timeout=5)
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks.values())

    keep_until(tmp_path / "checkpoints", 6)
    resumed = trine("pretrain", recipe, f"run.directory={tmp_path}")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stderr
    ours, theirs = metrics_of(tmp_path)[0], metrics_of(finished[0])[0]
    assert [m["step"] for m in ours] == [m["step"] for m in theirs]
    # The same layout on the same machine adds in the same order: equal to the last bit.
    assert [m["loss"] for m in ours] == [m["loss"] for m in theirs]
    assert [m["grad_norm"] for m in ours] == [m["grad_norm"] for m in theirs]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("lm loss")] == list(range(1, STEPS + 1))
    assert over_samples(tmp_path) == [4 * n for n in range(1, STEPS + 1)]


def test_a_run_continues_under_another_layout(
    finished: tuple[Path, str], trine: Any, recipe: Path, tmp_path: Path, metrics_of: Any
) -> None:
    """Begun with context parallelism, continued with interleaved stages and recompute: the samples and the losses are
    those of the run that never stopped. Losses within 1e-4: AdamW with its usual eps magnifies the rounding of another
    order of sums, as the first gradients of many elements are nothing else."""
    run = ["pretrain", recipe, f"run.directory={tmp_path}"]
    begun = trine(*run, "train.steps=3", "parallel.pipeline=1", "parallel.context=2")
    assert begun.returncode == 0, begun.stderr
    assert "context 2; each sequence dealt out in zigzag chunks" in begun.stderr
    continued = trine(*run, "parallel.virtual_pipeline=2", "train.recompute=full")
    assert continued.returncode == 0, continued.stderr
    assert "layers 1 + 1 + 1 + 1 (balanced)" in continued.stderr
    (ours, evaluations), (theirs, expected) = metrics_of(tmp_path), metrics_of(finished[0])
    assert [m["consumed_samples"] for m in ours] == [m["consumed_samples"] for m in theirs]
    assert [m["loss"] for m in ours] == pytest.approx([m["loss"] for m in theirs], rel=1e-4)
    assert evaluations[-1]["validation_loss"] == pytest.approx(expected[-1]["validation_loss"], rel=1e-4)


def test_a_run_continues_with_another_engine(
    finished: tuple[Path, str], trine: Any, recipe: Path, tmp_path: Path, metrics_of: Any
) -> None:
    """Begun by DeepSpeed with everything divided, continued by Megatron-Core in pipeline stages: weights, moments and
    schedule are handed over, and what is reported is that of the run that never stopped. Losses within 1e-4, as above."""
    run = ["pretrain", recipe, f"run.directory={tmp_path}"]
    zero = ["engine=deepspeed", "deepspeed.zero_optimization={stage: 3, stage3_param_persistence_threshold: 0}"]
    begun = trine(*run, "train.steps=4", "parallel.pipeline=1", *zero, "--nproc", 2)
    assert begun.returncode == 0, begun.stderr
    assert "ZeRO stage 3: all divided" in begun.stderr
    continued = trine(*run)
    assert continued.returncode == 0, continued.stderr
    assert (
        "step-00000004 was saved with engine=deepspeed: engine=megatron goes on with its weights, its optimizer state "
        "and its schedule" in continued.stderr
    )
    (ours, evaluations), (theirs, expected) = metrics_of(tmp_path), metrics_of(finished[0])
    for name in ("step", "lr", "consumed_samples"):
        assert [m[name] for m in ours] == [m[name] for m in theirs]
    assert [m["loss"] for m in ours] == pytest.approx([m["loss"] for m in theirs], rel=1e-4)
    assert evaluations[-1]["validation_loss"] == pytest.approx(expected[-1]["validation_loss"], rel=1e-4)
    log = (tmp_path / "logs" / "rank-1.log").read_text()
    assert not re.search(r"torch\.distributed\.\w+. is deprecated|cannot find", log), log


def test_context_and_data_ranks_train_and_evaluate_as_one_process(
    trine: Any, recipe: Path, tmp_path: Path, metrics_of: Any
) -> None:
    """What the trainer reads, counts and reports under context parallelism, with documents kept apart. Losses within
    1e-4, as AdamW with its usual eps magnifies rounding."""
    corpus = tmp_path / "short.jsonl"
    texts = (f"document {n} holds {n % 7} words of its own and ends" for n in range(900))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([str(corpus)], tmp_path / "tokens", train_tokenizer=300, validation_fraction=0.2)
    common = [f"data.directory={tmp_path / 'tokens'}", "train.document_masking=true", "parallel.pipeline=1"]
    found = []
    for layout in (["--nproc", 1], ["--nproc", 4, "parallel.context=2"]):
        run = tmp_path / f"run-{len(layout)}"
        done = trine("pretrain", recipe, f"run.directory={run}", "train.steps=4", *common, *layout)
        assert done.returncode == 0, done.stderr
        found.append(metrics_of(run))
    (one, of_one), (four, of_four) = found
    for name in ("step", "tokens", "consumed_samples", "lr"):
        assert [m[name] for m in four] == [m[name] for m in one]
    assert all(m["tokens_per_s"] == pytest.approx(4 * 32 / m["step_time_s"], rel=1e-3) for m in four)
    assert [m["loss"] for m in four] == pytest.approx([m["loss"] for m in one], rel=1e-4)
    assert [m["validation_loss"] for m in of_four] == pytest.approx([m["validation_loss"] for m in of_one], rel=1e-4)


def last_step(run: Path, metrics_of: Any) -> int:
    if not (run / "metrics.jsonl").exists() or not (run / "checkpoints" / "step-00000003").exists():
        return 0
    try:
        return int(metrics_of(run)[0][-1]["step"])
    except (ValueError, IndexError):
        return 0


def wait_for(condition: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.05)


def ranks_of(pid: int) -> dict[int, psutil.Process]:
    """Worker processes below the launcher, by rank."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.Process(pid).children(recursive=True):
        if "trine.launch.worker" in process.cmdline():
            found[int(process.environ()["RANK"])] = process
    return found


def keep_until(checkpoints: Path, step: int) -> None:
    """Forget checkpoints beyond ``step``: how far the killed run came depends on the machine."""
    import shutil

    for path in checkpoints.iterdir():
        if int(path.name.partition("-")[2].partition(".")[0]) > step:
            shutil.rmtree(path)


def test_run_that_diverges_stops_with_one_sentence(trine: Any, recipe: Path, tmp_path: Path) -> None:
    done = trine("pretrain", recipe, f"run.directory={tmp_path}", "optimizer.learning_rate=1e30", "train.steps=50")
    assert done.returncode == 1
    told = done.stderr.strip().splitlines()[-2]
    assert "step 12: loss nan and gradient norm nan are not finite, and 10 steps in a row were passed over" in told
    assert "lower optimizer.learning_rate=1e+30" in told
    assert "Traceback" not in done.stderr


def test_run_of_another_model_is_not_overwritten(finished: tuple[Path, str], trine: Any, recipe: Path) -> None:
    other = trine("pretrain", recipe, f"run.directory={finished[0]}", "model.ffn_hidden_size=64", "train.steps=9")
    assert other.returncode == 2
    assert "holds another model: model.ffn_hidden_size was 48 and is now 64" in other.stderr
    other = trine("pretrain", recipe, f"run.directory={finished[0]}", "precision.compute=bf16", "train.steps=9")
    assert other.returncode == 2
    assert "was made with precision.compute=fp32, now bf16: set it back" in other.stderr


def test_the_checkpoint_before_a_damaged_one_is_used(
    finished: tuple[Path, str], trine: Any, recipe: Path, tmp_path: Path, metrics_of: Any
) -> None:
    import shutil

    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    victim = next((run / "checkpoints" / "step-00000008").glob("*.distcp"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    done = trine("pretrain", recipe, f"run.directory={run}")
    assert done.returncode == 0, done.stderr
    assert f"is damaged: {victim.name} differs from what was written; it is now step-00000008.damaged" in done.stderr
    assert f"resuming from {run}/checkpoints/step-00000006" in done.stderr
    ours, theirs = metrics_of(run)[0], metrics_of(finished[0])[0]
    assert [(m["step"], m["loss"]) for m in ours] == [(m["step"], m["loss"]) for m in theirs]
