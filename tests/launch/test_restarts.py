"""``trine launch local``: ranks that are started again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from launching import write_run

from trine.configs.errors import UsageError
from trine.launch import local
from trine.launch.cli import main
from trine.launch.restarts import keep_running

pytestmark = pytest.mark.timeout(120)

Standin = Callable[[str], None]
Capture = pytest.CaptureFixture[str]


class Starts:
    """Lives that end with these codes; a number before a colon is the checkpoint that one makes."""

    def __init__(self, *lives: str) -> None:
        self._lives, self.count = lives, 0
        self.checkpoint: Path | None = None

    def start(self) -> int:
        """Live one."""
        checkpoint, _, code = self._lives[self.count].rpartition(":")
        self.count += 1
        self.checkpoint = Path(f"step-{checkpoint}") if checkpoint else self.checkpoint
        return int(code)

    def newest(self) -> Path | None:
        """The last checkpoint."""
        return self.checkpoint


@pytest.mark.parametrize(
    ("lives", "restarts", "code", "count"),
    [
        (["0"], 3, 0, 1),
        (["2", "0"], 3, 2, 1),
        (["75", "0"], 3, 75, 1),
        (["130", "0"], 3, 130, 1),
        (["143", "0"], 3, 143, 1),
        (["1", "1", "0"], 2, 0, 3),
        (["1", "1", "1", "0"], 2, 1, 3),
        (["1", "0"], 0, 1, 1),
        (["1:1", "1", "2:1", "1", "1", "0"], 2, 1, 5),  # a new checkpoint begins the count anew
    ],
)
def test_how_often(lives: list[str], restarts: int, code: int, count: int) -> None:
    starts = Starts(*lives)
    assert keep_running(starts.start, starts.newest, restarts) == code
    assert starts.count == count


def test_each_restart_is_a_line(capsys: Capture) -> None:
    starts = Starts("1", "4:1", "0")
    keep_running(starts.start, starts.newest, 3)
    assert capsys.readouterr().err.splitlines() == [
        "trine: restart 1 of 3 from the first step: there is no checkpoint yet",
        "trine: restart 1 of 3 from checkpoint step-4",
    ]


def test_fewer_than_none() -> None:
    starts = Starts("0")
    with pytest.raises(UsageError, match="--max-restarts -1 is less than none: use 0 or more"):
        keep_running(starts.start, starts.newest, -1)
    assert starts.count == 0


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small run in the working directory, whose ranks are those of ``standin_ranks``."""
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    real = local.launch_local
    monkeypatch.setattr(local, "launch_local", lambda *a, **k: real(*a, **k, module="standin_ranks"))
    return tmp_path


def test_ranks_are_really_started_again(small: Path, standin: Standin, capfd: Capture) -> None:
    """The first two lives fail, of which the first makes a checkpoint; the third goes through."""
    standin("fail_twice")
    assert main(["launch", "local", "recipe.yaml", "--nproc", "2", "--max-restarts", "1"]) == 0
    told = [line for line in capfd.readouterr().err.splitlines() if "restart" in line or "failed" in line]
    assert told == [
        "trine: rank 1 of 2 failed: life 1",
        "trine: restart 1 of 1 from checkpoint run/checkpoints/step-00000001",
        "trine: rank 1 of 2 failed: life 2",
        "trine: restart 1 of 1 from checkpoint run/checkpoints/step-00000002",
    ]


def test_wrong_use_is_not_tried_again(small: Path, standin: Standin, capfd: Capture) -> None:
    standin("refuse")
    assert main(["launch", "local", "recipe.yaml", "--nproc", "2"]) == 2
    assert capfd.readouterr().err == "trine: train.steps=1000 is too few: use more\n"
    assert main(["launch", "local", "recipe.yaml", "train.stepz=1"]) == 2
    assert "train.stepz" in capfd.readouterr().err


def test_ranks_of_others_start_none(small: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["launch", "local", "recipe.yaml"]) == 2
    assert capfd.readouterr().err == "trine: trine launch local starts its own ranks: run it by itself, without torchrun\n"
