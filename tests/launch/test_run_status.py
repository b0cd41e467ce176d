"""``trine launch status`` and ``trine launch stop``, without a cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trine.launch.cli import main
from trine.pretrain.exit_state import ExitState, write
from trine.pretrain.run_lock import RunLock

pytestmark = pytest.mark.timeout(60)

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run, on a machine without Slurm."""
    (tmp_path / "run" / "logs").mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "run"


def status(capsys: Capture, run: Path) -> list[str]:
    """What the command prints."""
    assert main(["launch", "status", str(run)]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_run_that_has_said_nothing(run: Path, capsys: Capture) -> None:
    assert status(capsys, run) == [
        "outcome     was killed, or has not begun",
        "checkpoint  none yet",
    ]


def test_a_run_that_was_stopped(run: Path, capsys: Capture) -> None:
    (run / "checkpoints" / "step-00001200").mkdir(parents=True)
    (run / "checkpoints" / "step-00001300.writing").mkdir()
    write(run, ExitState("stopped", True, "the launcher's time limit comes near", 1200, 9000, None, 75))
    (run / "slurm").mkdir()
    (run / "slurm" / "job.json").write_text(json.dumps({"name": "a", "jobs": ["7"]}))
    lines = status(capsys, run)
    assert lines[0] == (
        "outcome     stopped at step 1,200 of 9,000: the launcher's time limit comes near; the same command continues it"
    )
    assert lines[1].startswith("job         scontrol is not on this machine")
    assert lines[2] == f"checkpoint  {run}/checkpoints/step-00001200"


def test_stop(run: Path, capsys: Capture) -> None:
    assert main(["launch", "stop", str(run)]) == 0
    assert (run / "stop").read_bytes() == b""
    assert capsys.readouterr().out.startswith(f"wrote {run}/stop: the run saves after the step at hand")


def test_a_run_that_holds_its_folder(run: Path, capsys: Capture) -> None:
    with RunLock.acquire(run):
        assert status(capsys, run)[0].startswith("outcome     runs, or was killed: run.lock is held by process ")
        assert main(["launch", "stop", str(run)]) == 0
        assert (run / "stop").exists()


def test_there_is_nothing_to_stop_where_nothing_runs(run: Path, capsys: Capture) -> None:
    """A wish that is left behind would stop the next run."""
    write(run, ExitState("finished", False, "all steps are done", 60, 60, None, 0))
    assert main(["launch", "stop", str(run)]) == 0
    assert capsys.readouterr().out == "nothing to stop: finished at step 60 of 60: all steps are done\n"
    assert not (run / "stop").exists()


@pytest.mark.parametrize("command", ["status", "stop"])
def test_no_run(command: str, tmp_path: Path, capsys: Capture) -> None:
    assert main(["launch", command, str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"trine: {tmp_path} is no folder of a run: name the run.directory of one\n"
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_cannot_be_read(run: Path, capsys: Capture) -> None:
    (run / "slurm").mkdir()
    (run / "slurm" / "job.json").write_text("{")
    assert main(["launch", "stop", str(run)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"trine: {run}/slurm/job.json cannot be read (")
    assert told.endswith("see with squeue whether the run has a job, and remove job.json\n")
