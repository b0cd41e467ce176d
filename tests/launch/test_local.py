"""Ranks of one machine: started, ended and reported together."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trine.configs.errors import UsageError
from trine.launch.local import launch_local, rank_environment
from trine.launch.machine import usable_cores

pytestmark = pytest.mark.timeout(60)

Standin = Callable[[str], None]
Pids = Callable[[int], list[int]]
AssertGone = Callable[[list[int]], None]

LAUNCH = """
import sys
from pathlib import Path
from trine.launch.local import launch_local
sys.exit(launch_local([sys.argv[1]], 2, Path(sys.argv[2]), module="standin_ranks"))
"""


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """The folder of logs that the recipe's run has."""
    return tmp_path / "run" / "logs"


def launch(recipe: Path, logs: Path, *overrides: str) -> int:
    checkpoints = logs.parent / "checkpoints"
    words = [str(recipe), *overrides]
    return launch_local(words, 2, logs, checkpoint_directory=checkpoints, module="standin_ranks")


def test_success(recipe: Path, logs: Path, standin: Standin, capfd: pytest.CaptureFixture[str]) -> None:
    standin("succeed")
    before = dict(os.environ), signal.getsignal(signal.SIGTERM)
    path = "$$HOME ${local_rank}"  # nothing on the way may take this for its own variables
    assert launch(recipe, logs, f"data.directory={path}") == 0
    console = capfd.readouterr()
    assert f"rank 0 reads {path}" in console.out
    assert "rank 1" not in console.out + console.err
    log = (logs / "rank-1.log").read_text()
    assert f"rank 1 reads {path}" in log
    threads = os.environ.get("OMP_NUM_THREADS", max(1, usable_cores() // 2))
    assert f"rank 1 has {threads} threads" in log
    assert "| rank 1 | host " in log.splitlines()[0]
    assert (dict(os.environ), signal.getsignal(signal.SIGTERM)) == before


def test_logs_are_continued(recipe: Path, logs: Path, standin: Standin) -> None:
    standin("succeed")
    logs.mkdir(parents=True)
    (logs / "rank-0.log").write_text("the first attempt\n")
    assert launch(recipe, logs) == 0
    assert (logs / "rank-0.log").read_text().startswith("the first attempt\n=== ")


def test_one_rank_fails(
    recipe: Path, logs: Path, standin: Standin, pids: Pids, assert_gone: AssertGone,
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    standin("fail")
    assert launch(recipe, logs) == 1
    assert_gone(pids(2))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert "closing signal SIGTERM" in (logs / "launcher.log").read_text()
    assert capfd.readouterr().err.splitlines() == [
        "trine: rank 1 of 2 failed: the loss is not finite",
        f"trine: its log is {logs / 'rank-1.log'}",
    ]
    assert "in fail\n" in (logs / "rank-1.log").read_text()


def test_a_mistake_of_the_user(recipe: Path, logs: Path, standin: Standin, capfd: pytest.CaptureFixture[str]) -> None:
    standin("refuse")
    assert launch(recipe, logs) == 2
    assert capfd.readouterr().err == "trine: train.steps=2 is too few: use more\n"


def test_one_rank_is_killed_while_another_waits_for_it(
    recipe: Path, logs: Path, standin: Standin, pids: Pids, assert_gone: AssertGone,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    standin("die_in_collective")
    (logs.parent / "checkpoints" / "step-00000003").mkdir(parents=True)
    assert launch(recipe, logs) == 1
    assert_gone(pids(3))
    first, second = capfd.readouterr().err.splitlines()[-2:]
    assert first.startswith("trine: rank 1 of 2 was killed by signal 9 (SIGKILL)")
    assert "rank-1.log" in second
    assert second.endswith("the same command resumes from the newest checkpoint")


def test_half_a_checkpoint_is_nothing_to_resume_from(
    recipe: Path, logs: Path, standin: Standin, capfd: pytest.CaptureFixture[str]
) -> None:
    standin("fail")
    (logs.parent / "checkpoints" / "step-00000003.writing").mkdir(parents=True)
    assert launch(recipe, logs) == 1
    assert "resumes" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_ranks_do_not_outlive_the_launcher(
    number: signal.Signals, code: int,
    recipe: Path, logs: Path, standin: Standin, pids: Pids, assert_gone: AssertGone,
) -> None:  # fmt: skip
    standin("wait")
    command = [sys.executable, "-c", LAUNCH, str(recipe), str(logs)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as launcher:
        ranks = pids(6)
        launcher.send_signal(number)
        _, errors = launcher.communicate()
    assert launcher.returncode == code
    assert errors == ("" if code < 0 else f"trine: stopped by {number.name}\n")
    assert_gone(ranks)


def test_environment_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in rank_environment(2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert rank_environment(1)["OMP_NUM_THREADS"] == str(usable_cores())
    assert rank_environment(1000)["OMP_NUM_THREADS"] == "1"


def test_logs_that_cannot_be_written(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UsageError, match=r"choose another run\.directory"):
        launch(recipe, tmp_path / "run" / "logs")
