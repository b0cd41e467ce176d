"""Runs that are stopped, refused, or meet a full disk, from the command line: what they say and what they leave."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(240)

END_SECONDS = 90
ONE_RANK = ("parallel.pipeline=1", "--nproc", "1")


def exit_state(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((run / "exit_state.json").read_text())
    return state


def wait_for(condition: Any, seconds: float = END_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def begins_step(run: Path, metrics_of: Any, step: int) -> bool:
    try:
        return int(metrics_of(run)[0][-1]["step"]) >= step
    except (OSError, ValueError, IndexError):
        return False


@contextmanager
def started(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A run beside the test, which ends with it."""
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def deterministic(trine: Any, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run that uses deterministic kernels alone: other kernels, other last bits."""
    directory = tmp_path_factory.mktemp("runs") / "deterministic"
    done = trine("pretrain", recipe, f"run.directory={directory}", "train.deterministic=true")
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.parametrize(("number", "kernels"), [(signal.SIGTERM, "any"), (signal.SIGUSR1, "deterministic")])
def test_a_signal_saves_and_the_same_command_goes_on(
    number: signal.Signals, kernels: str, finished: tuple[Path, str], deterministic: Path,
    command: Any, environment: Any, recipe: Path, tmp_path: Path, metrics_of: Any, trine: Any,
) -> None:  # fmt: skip
    """Two ranks stop after the same step, with a checkpoint of it; the rest is that of the uninterrupted run, bit for
    bit. A second signal while they save changes nothing."""
    whole = {"any": finished[0], "deterministic": deterministic}[kernels]
    arguments = ["pretrain", recipe, f"run.directory={tmp_path}"]
    arguments += ["train.deterministic=true"] if kernels == "deterministic" else []
    with started(command(*arguments, "train.steps=100000"), environment()) as run:
        wait_for(lambda: begins_step(tmp_path, metrics_of, 2))
        run.send_signal(number)
        run.send_signal(number)
        _, printed = run.communicate(timeout=END_SECONDS)
    assert run.returncode == 75, printed
    state = exit_state(tmp_path)
    assert (state["outcome"], state["resume"], state["exit_code"]) == ("stopped", True, 75)
    assert state["checkpoint"].endswith(f"step-{state['step']:08d}")
    assert f"stopped at step {state['step']}, since a signal asked for it" in printed
    resumed = trine(*arguments, f"train.steps={max(8, state['step'] + 1)}")
    assert resumed.returncode == 0, resumed.stderr
    ours, theirs = metrics_of(tmp_path)[0], metrics_of(whole)[0]
    assert [(m["step"], m["loss"], m["grad_norm"]) for m in ours[:8]] == [
        (m["step"], m["loss"], m["grad_norm"]) for m in theirs
    ]
    attempts = json.loads((tmp_path / "attempts.json").read_text())
    assert [attempt["end"].partition(" ")[0] for attempt in attempts] == ["stopped", "finished"]
    assert exit_state(tmp_path)["outcome"] == "finished"


def test_a_stop_file_ends_a_run_that_holds_its_folder(
    command: Any, environment: Any, recipe: Path, tmp_path: Path, metrics_of: Any, trine: Any
) -> None:
    arguments = ["pretrain", recipe, f"run.directory={tmp_path}", "train.steps=100000", *ONE_RANK]
    with started(command(*arguments), environment()) as run:
        wait_for(lambda: begins_step(tmp_path, metrics_of, 1))
        second = trine(*arguments)
        assert second.returncode == 2
        assert f"run.directory={tmp_path} is in use by process" in second.stderr
        assert run.poll() is None
        (tmp_path / "stop").touch()
        _, printed = run.communicate(timeout=END_SECONDS)
    assert run.returncode == 75, printed
    state = exit_state(tmp_path)
    assert (state["outcome"], state["resume"]) == ("stopped", False)
    assert state["reason"] == "the stop file asked for it"
    assert not (tmp_path / "run.lock").exists()
    assert not (tmp_path / "stop").exists()
    # A wish that was made while a run waited for its turn counts; what a launcher asked of an earlier one does not.
    (tmp_path / "stop").touch()
    again = trine(*arguments)
    assert (again.returncode, exit_state(tmp_path)["step"]) == (75, state["step"] + 1), again.stderr
    (tmp_path / "stop").write_text("requeue")
    last = trine(*arguments[:3], f"train.steps={state['step'] + 2}", *ONE_RANK)
    assert last.returncode == 0, last.stderr


def test_a_run_stops_when_its_time_is_over(trine: Any, recipe: Path, tmp_path: Path) -> None:
    done = trine(
        "pretrain", recipe, f"run.directory={tmp_path}", "train.steps=100000", "train.max_wall_time=2s", *ONE_RANK
    )
    assert done.returncode == 75, done.stderr
    state = exit_state(tmp_path)
    assert state["reason"] == "train.max_wall_time has passed"
    assert state["step"] >= 1
    assert (state["resume"], Path(state["checkpoint"]).is_dir()) == (True, True)


def test_what_a_failing_run_has_trained_is_saved_first(
    trine: Any, recipe: Path, data: Path, tmp_path: Path, metrics_of: Any
) -> None:
    """A damaged sample ends the run at some step; the checkpoint is of the step before it, not of the interval."""
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    shard = next(copy.glob("train-*.tar"))
    content = bytearray(shard.read_bytes())
    for place in range(len(content) // 3, 2 * len(content) // 3, 512):
        content[place] ^= 255
    run = tmp_path / "run"
    words = ["pretrain", recipe, f"run.directory={run}", "checkpoint.interval=0", "evaluation.interval=0", *ONE_RANK]
    begun = trine(*words, "train.steps=3")
    assert begun.returncode == 0, begun.stderr
    shard.write_bytes(bytes(content))
    failed = trine(*words, f"data.directory={copy}", "train.steps=1000", "data.workers=0")
    assert failed.returncode == 1
    state = exit_state(run)
    assert (state["outcome"], state["resume"]) == ("failed", True)
    last = metrics_of(run)[0][-1]["step"]
    assert state["checkpoint"].endswith(f"step-{last:08d}")
    assert f"the run fails, and step {last} was saved before" in failed.stderr


def test_wrong_use_is_told_to_the_launcher(trine: Any, finished: tuple[Path, str], recipe: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    refused = trine("pretrain", recipe, f"run.directory={run}", "model.ffn_hidden_size=64", "train.steps=9")
    assert refused.returncode == 2
    state = exit_state(run)
    assert (state["outcome"], state["resume"], state["exit_code"]) == ("refused", False, 2)
    assert "model.ffn_hidden_size was 48" in state["reason"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two checkpoints of the tiny run and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_no_run_before_its_last_save(
    small_disk: Path, trine: Any, recipe: Path, tmp_path: Path, metrics_of: Any
) -> None:
    """Saves fail and the run goes on, its old checkpoint whole; the last save must succeed, and does when there is
    room again."""
    checkpoints, run = small_disk / "checkpoints", tmp_path / "run"
    words = ["pretrain", recipe, f"run.directory={run}", f"checkpoint.directory={checkpoints}", "checkpoint.keep=1",
             "checkpoint.interval=1", "checkpoint.failure_budget=100"]  # fmt: skip
    begun = trine(*words, "train.steps=3")
    assert begun.returncode == 0, begun.stderr
    # What is left has room for a lock.
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - 32768))
    failed = trine(*words)
    assert failed.returncode == 1
    assert "No space left on device" in failed.stderr
    assert "make room, or name another checkpoint.directory; the checkpoints before it are whole" in failed.stderr
    assert "the run goes on (checkpoint.on_failure=continue)" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert [m["step"] for m in metrics_of(run)[0]] == list(range(1, 9))
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000003"]
    stopped = trine(*words, "checkpoint.on_failure=stop")
    assert stopped.returncode == 1
    assert metrics_of(run)[0][-1]["step"] in (4, 5)  # step 4 may be written while step 5 is trained
    (small_disk / "other").unlink()
    done = trine(*words)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000008"]
