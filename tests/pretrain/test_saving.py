"""Saves that are cut short or meet a broken disk: what was there before is whole, and a run goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dying import PHASES
from training import config_of

from trine.configs.errors import RunError
from trine.launch.pool import RankPool
from trine.pretrain.checkpoints import folder
from trine.pretrain.checkpoints.manifest import verify
from trine.pretrain.journal import Journal

pytestmark = pytest.mark.timeout(240)

STACK = [{"mixer": "gated_retention", "layers": 1, "heads": 2}]


def raw(**sections: Any) -> dict[str, Any]:
    return config_of(STACK, **sections).model_dump(mode="json", exclude_none=True)


@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_at_any_moment_of_a_save_leaves_whole_checkpoints(ranks: RankPool, tmp_path: Path, phase: str) -> None:
    """Until the third checkpoint has its name the second is the newest; half a one that is going has lost its name.
    Whatever is left, the next save clears it away."""
    config = raw(checkpoint={"keep": 2})
    with pytest.raises(RunError, match="killed"):
        ranks.run("dying:killed_while_saving", 1, config=config, save=str(tmp_path), phase=phase)
    has_name = phase in ("before an old one goes", "while an old one goes")
    newest = folder.newest(tmp_path)
    assert newest is not None
    assert folder.step_of(newest) == (3 if has_name else 2)
    for path in folder.complete(tmp_path):
        verify(path)
    assert ranks.run("training:error_of_loading", 1, config=config, load=str(tmp_path)) == [f"loaded {newest.name}"]
    ranks.run("training:train", 1, config=config, steps=1, first_step=3, save=str(tmp_path))
    assert [folder.step_of(path) for path in folder.complete(tmp_path)] == [folder.step_of(newest), 4]
    assert {path.name for path in tmp_path.iterdir()} == {newest.name, "step-00000004"}


def test_a_checkpoint_folder_that_vanishes_is_made_again(ranks: RankPool, data: Path, tmp_path: Path) -> None:
    """Somebody clears the folder in mid-run; the run notes it and saves again."""
    config = config_of(
        STACK,
        model={"vocabulary_size": None},
        train={"steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 32},
        data={"directory": str(data)},
        evaluation={"interval": 0},
        checkpoint={"interval": 2},
        run={"directory": str(tmp_path / "run")},
    ).model_dump(mode="json", exclude_none=True)
    ((outcome, warnings),) = ranks.run("running:loses_checkpoints", 1, config=config, at_step=4)
    assert outcome == "finished"
    assert any("could not be written" in line for line in warnings), warnings
    verify(tmp_path / "run" / "checkpoints" / "step-00000006")


def test_a_run_without_tensorboard_goes_on(ranks: RankPool, data: Path, tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    config = config_of(
        STACK,
        model={"vocabulary_size": None},
        train={"steps": 2, "global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 32},
        data={"directory": str(data)},
        evaluation={"interval": 0},
        run={"directory": str(tmp_path)},
    ).model_dump(mode="json", exclude_none=True)
    ((outcome, warnings),) = ranks.run("running:slow", 1, config=config, seconds=0.0)
    assert outcome == "finished"
    assert any("TensorBoard is off" in line for line in warnings)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3  # two steps and a checkpoint


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_journal_waits_for_room(tiny_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Lines that a full disk refuses are written when there is room again, each once and in order."""
    journal = Journal(tiny_disk / "metrics.jsonl", 0)
    journal.write({"step": 0})
    (tiny_disk / "other").write_bytes(bytes(shutil.disk_usage(tiny_disk).free))
    for step in range(1, 200):
        journal.write({"step": step, "text": "x" * 40})
    assert len(caplog.records) == 1
    assert "cannot be written for now: No space left on device" in caplog.text
    (tiny_disk / "other").unlink()
    journal.write({"step": 200})
    journal.close()
    lines = (tiny_disk / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(201))
