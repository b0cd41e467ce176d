"""``trine checkpoint prune``: what goes, what never goes, and who is in the way."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_damage import Capture, checkpoint, flip_byte, names, put, refused

from trine.pretrain.checkpoints import folder
from trine.pretrain.lock_holder import encode, this_process
from trine.pretrain.run_lock import LOCK, RunLock

pytestmark = pytest.mark.timeout(300)


def test_prune_asks_first(run: Path, capsys: Capture) -> None:
    before = names(run)
    assert checkpoint("prune", run, "--keep", "1") == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("would remove step-00000001, ")
    assert second.startswith("would remove step-00000002, ")
    assert last.startswith("2 checkpoints, ")
    assert last.endswith(": --yes removes them; step-00000003 stays and is verified before")
    assert names(run) == before
    assert not (run / LOCK).exists()


def test_prune(run: Path, one: Path, capsys: Capture) -> None:
    shutil.copytree(one, one.with_name("step-00000004"))
    (one.parent / "step-00000005.writing").mkdir()
    shutil.copytree(one, one.with_name("step-00000002.damaged"))
    assert checkpoint("prune", run, "--keep", "1", "--keep-every", "2", "--yes") == 0
    assert names(run) == ["step-00000002", "step-00000002.damaged", "step-00000004", "step-00000005.writing"]
    size = sum(file.stat().st_size for file in one.with_name("step-00000002").iterdir()) / 1e6
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"removed step-00000003, {size:.1f} MB", f"removed 2 checkpoints, {2 * size:.1f} MB"
    ]  # fmt: skip
    assert checkpoint("prune", run, "--keep", "9", "--unfinished", "--damaged", "--yes") == 0
    assert names(run) == ["step-00000002", "step-00000004"]
    assert not (run / LOCK).exists()
    capsys.readouterr()
    assert checkpoint("prune", run, "--keep", "9", "--yes") == 0
    assert capsys.readouterr().out == f"{run}: nothing to remove\n"


def test_prune_keeps_the_others_where_the_newest_is_damaged(run: Path, one: Path, capsys: Capture) -> None:
    flip_byte(one / "__0_1.distcp")
    before = names(run)
    assert refused(capsys, 1, "prune", run, "--keep", "1", "--yes") == (
        "step-00000003, the newest, is damaged (__0_1.distcp differs from what was written), so nothing is removed: "
        "restore it from a copy or rename it to step-00000003.damaged"
    )
    assert names(run) == before
    assert checkpoint("prune", run, "--keep", "1", "--yes", "--no-verify") == 0
    assert names(run) == ["step-00000003"]


def test_prune_removes_nothing_where_no_complete_one_would_remain(run: Path, capsys: Capture) -> None:
    for path in list((run / "checkpoints").iterdir()):
        folder.set_aside(path)
    before = names(run)
    for yes in ([], ["--yes"]):
        told = refused(capsys, 1, "prune", run, "--keep", "1", "--damaged", "--no-verify", *yes)
        assert "holds no complete checkpoint, so nothing is removed" in told
        assert names(run) == before


@pytest.mark.parametrize("place", ["run", "checkpoints", "elsewhere"])
def test_prune_is_refused_while_a_run_lives(run: Path, place: str, tmp_path: Path, capsys: Capture) -> None:
    """By whichever name the folder is given; ``elsewhere`` only the checkpoint says whose it is."""
    named = {"run": run, "checkpoints": run / "checkpoints", "elsewhere": tmp_path / "elsewhere"}[place]
    if place == "elsewhere":
        (run / "checkpoints").rename(named)
        state = json.loads((named / "step-00000003" / "state.json").read_text())
        # The run was started in a folder from which these relative paths led.
        state["run"]["config"]["run"]["directory"] = "run"
        state["run"]["config"]["checkpoint"]["directory"] = "elsewhere"
        put(named / "step-00000003" / "state.json", json.dumps(state))
    else:
        (run / "config.yaml").touch()
    with RunLock.acquire(run, beat_seconds=0.1):
        assert checkpoint("prune", named, "--keep", "1") == 0
        assert f"{run} is locked by process {os.getpid()} on host " in capsys.readouterr().out
        assert checkpoint("prune", named, "--keep", "1", "--yes") == 2
        told = capsys.readouterr()
        assert "nothing is removed where a run may write, which prunes by itself (checkpoint.keep)" in told.err
        assert f"run.directory={run} is in use by process {os.getpid()} on host " in told.err
        assert told.out == ""
    assert checkpoint("prune", named, "--keep", "1", "--yes") == 0
    assert [path.name for path in folder.complete(named if place == "elsewhere" else run / "checkpoints")] == [
        "step-00000003"
    ]


def test_a_lock_of_a_process_that_has_ended_is_no_obstacle(run: Path, capsys: Capture) -> None:
    (run / LOCK).write_bytes(encode(replace(this_process(), pid_started=1.0), 7))
    assert checkpoint("prune", run, "--keep", "1") == 0
    assert "locked" not in capsys.readouterr().out
    assert checkpoint("prune", run, "--keep", "1", "--yes") == 0
    assert names(run) == ["step-00000003"]


def test_a_copy_is_not_its_original(written: Path, run: Path, capsys: Capture) -> None:
    with RunLock.acquire(written, beat_seconds=0.1):
        assert checkpoint("prune", run / "checkpoints", "--keep", "1", "--yes") == 0
    assert names(run) == ["step-00000003"]


def test_a_link_is_left_alone(run: Path, one: Path, tmp_path: Path) -> None:
    one.with_name("step-00000001").rename(tmp_path / "archived")
    one.with_name("step-00000001").symlink_to(tmp_path / "archived")
    assert checkpoint("prune", run, "--keep", "1", "--yes") == 0
    assert names(run) == ["step-00000001", "step-00000003"]
    assert len(list((tmp_path / "archived").iterdir())) == 9
