"""The DIR of ``trine checkpoint``, and what is no DIR for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkpoint_damage import Capture, checkpoint, refused

pytestmark = pytest.mark.timeout(300)

NOBODY = 65534


def test_a_folder_without_checkpoints_is_no_mistake(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "checkpoints").mkdir()
    for named in (tmp_path, tmp_path / "checkpoints"):
        for words in (["list"], ["inspect"], ["verify"], ["prune", "--keep", "1"], ["prune", "--keep", "1", "--yes"]):
            assert checkpoint(words[0], named, *words[1:]) == 0
            told = capsys.readouterr()
            assert told.out.startswith(f"{named}: no") and told.out.count("\n") == 1
            assert told.err == ""


def test_a_run_that_keeps_its_checkpoints_elsewhere(recipe: Path, run: Path, capsys: Capture) -> None:
    text = recipe.read_text().replace("data: {", "checkpoint: {directory: other}\ndata: {")
    (run / "config.yaml").write_text(text.replace(f"directory: {run}", "directory: run"))
    (run / "checkpoints").rename(run.parent / "other")
    assert checkpoint("list", run) == 0
    assert "pp2  newest" in capsys.readouterr().out
    shutil.rmtree(run.parent / "other")
    assert checkpoint("list", run) == 0
    assert capsys.readouterr().out == f"{run}: no checkpoint yet\n"


def test_what_is_no_place_for_checkpoints(run: Path, one: Path, tmp_path: Path, capsys: Capture) -> None:
    (run / "text").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    for command in (["list"], ["inspect"], ["verify"], ["prune", "--keep", "1"]):
        for place, expected in {
            run / "nowhere": "does not exist: name the folder of a run, a folder of checkpoints",
            run / "text": "is a file: name the folder of a run",
            tmp_path / "other": "holds no checkpoint: name the folder of a run",
            "s3://bucket/run": "is a URL, and checkpoints are read in folders alone",
        }.items():
            assert f"DIR={place} {expected}" in refused(capsys, 2, command[0], place, *command[1:])
    for command in (["list"], ["prune", "--keep", "1"]):
        assert refused(capsys, 2, command[0], one, *command[1:]) == (
            f"DIR={one} is one checkpoint: name the folder that holds it, {one.parent}"
        )


@pytest.mark.parametrize("words", [[], ["list"], ["inspect"], ["verify"], ["prune"]])
def test_help(words: list[str], capsys: Capture) -> None:
    assert checkpoint(*words, "--help") == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: {' '.join(['trine', 'checkpoint', *words])}")
    assert ("examples:" in told and "exit codes: 0" in told) == bool(words)


def test_wrong_use(run: Path, capsys: Capture) -> None:
    assert "--keep 0 is too few" in refused(capsys, 2, "prune", run, "--keep", "0")
    assert "--keep-every 0 is too few" in refused(capsys, 2, "prune", run, "--keep", "1", "--keep-every", "0")
    assert "--workers 0 reads nothing: use 1 or more" in refused(capsys, 2, "verify", run, "--workers", "0")
    assert "--json" in refused(capsys, 2, "list", run, "--json", run / "nowhere" / "list.json")
    assert "required: --keep" in refused(capsys, 2, "prune", run)


@contextmanager
def without_rights(path: Path) -> Iterator[None]:
    """Within it this process may not look into ``path``."""
    user = os.geteuid()
    path.chmod(0)
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(0o700)


def test_no_permission(run: Path, one: Path, capsys: Capture) -> None:
    assert checkpoint("list", run) == checkpoint("verify", run) == checkpoint("prune", run, "--keep", "1") == 0
    capsys.readouterr()
    with without_rights(run.parent):
        for words in (["list"], ["inspect"], ["verify"], ["prune", "--keep", "1"]):
            told = refused(capsys, 1, words[0], run, *words[1:])
            assert told == f"{run} cannot be read (Permission denied): make it readable, or name another DIR"


def test_one_manifest_that_cannot_be_read(one: Path, capsys: Capture) -> None:
    """The list goes on; what is asked of that one alone is refused."""
    (one / "manifest.json").unlink()
    (one / "manifest.json").mkdir()
    assert refused(capsys, 1, "inspect", one) == (
        f"{one / 'manifest.json'} cannot be read (Is a directory): make it readable, or name another DIR"
    )
    assert checkpoint("list", one.parent) == 0
    assert "manifest.json cannot be read (Is a directory)" in capsys.readouterr().out
    assert checkpoint("verify", one) == 1
    assert "step-00000003: manifest.json cannot be read (Is a directory)" in capsys.readouterr().out
