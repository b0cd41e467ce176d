"""Saves that are cut short or meet a broken disk: what was there before is whole, and a run goes on."""

from __future__ import annotations

import json
import os
import pickle
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
from trine.pretrain.checkpoints.manifest import describe, read_manifest, verify, write_manifest
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


def test_a_run_that_has_lost_its_lock_ends_and_leaves_the_other_alone(
    ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    """What it was writing gets no name, and what the other is writing stays."""
    config = config_of(
        STACK,
        model={"vocabulary_size": None},
        train={"steps": 9, "global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 32},
        data={"directory": str(data)},
        evaluation={"interval": 0},
        checkpoint={"interval": 2},
        run={"directory": str(tmp_path)},
    ).model_dump(mode="json", exclude_none=True)
    told = ranks.run("running:loses_lock", 2, config=config, at_step=4)
    assert all("another run has taken over run.directory=" in outcome for outcome, _ in told)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {name for name in names if not name.startswith("step-00000004.")} == {
        "step-00000002", "step-00000099.abc.writing"
    }  # fmt: skip
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) <= 5


def test_a_checkpoint_takes_the_place_of_one_of_its_step(tmp_path: Path) -> None:
    old = folder.path_of(tmp_path, 7)
    old.mkdir()
    (old / "state.json").write_text("old")
    writing = folder.begin(tmp_path, 7)
    (writing / "state.json").write_text("new")
    assert folder.commit(writing, [writing / "state.json"]) == old
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert (old / "state.json").read_text() == "new"


def test_a_file_that_is_gone_before_the_end_fails_the_save(ranks: RankPool, tmp_path: Path) -> None:
    """Ranks that write to disks of their own, say: a checkpoint without their files never gets its name."""
    with pytest.raises(RunError, match=r"could not be written .*No such file or directory.*__0_0\.distcp"):
        ranks.run("dying:loses_a_file", 1, config=raw(), save=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_index_that_would_run_code_is_not_opened(ranks: RankPool, tmp_path: Path) -> None:
    """Though its manifest vouches for it: who hands over a checkpoint writes both."""
    ranks.run("training:train", 1, config=raw(), steps=1, save=str(tmp_path))
    path = folder.newest(tmp_path)
    assert path is not None
    (path / ".metadata").write_bytes(pickle.dumps(_Foreign(str(tmp_path / "ran"))))
    files = read_manifest(path)
    write_manifest(path, files | {".metadata": describe(path / ".metadata")})
    verify(path)
    (told,) = ranks.run("training:error_of_loading", 1, config=raw(), load=str(tmp_path))
    assert "asks for posix.mkdir, which no index of tensors is made of" in told
    assert not (tmp_path / "ran").exists()


class _Foreign:
    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self._path,)


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


def test_a_journal_goes_back_while_lines_wait(tiny_disk: Path) -> None:
    """What waits for room is forgotten as what is on the disk."""
    journal = Journal(tiny_disk / "metrics.jsonl", 0)
    for step in range(1, 4):
        journal.write({"step": step})
    (tiny_disk / "other").write_bytes(bytes(shutil.disk_usage(tiny_disk).free))
    for step in range(4, 250):
        journal.write({"step": step, "text": "x" * 40})
    (tiny_disk / "other").unlink()
    journal.forget_after(2)
    journal.write({"step": 3})
    journal.close()
    assert [json.loads(line)["step"] for line in (tiny_disk / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
