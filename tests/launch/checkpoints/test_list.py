"""``trine checkpoint list``: what is there, whole, unfinished and damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_damage import Capture, checkpoint, flip_byte

from trine.pretrain.checkpoints import folder

pytestmark = pytest.mark.timeout(300)


def test_list(run: Path, one: Path, capsys: Capture) -> None:
    os.utime(one / "manifest.json", (1e9, 1e9))
    (one.parent / "step-00000010.writing").mkdir()
    (one.parent / "step-00000010.writing" / "part").write_bytes(b"x" * 2500)
    folder.set_aside(one.with_name("step-00000001"))
    (one.parent / "notes").mkdir()
    for named in (run, run / "checkpoints"):
        assert checkpoint("list", named) == 0
        told = capsys.readouterr()
        titles, first, second, third, last = told.out.splitlines()
        assert titles.split() == ["step", "tokens", "written", "size", "state", "layout"]
        assert first.split()[:2] + first.split()[6:] == ["1", "64", "damaged", "2", "ranks:", "pp2"]
        assert second.split()[:2] + second.split()[6:] == ["2", "128", "complete", "2", "ranks:", "pp2"]
        assert third.split()[:2] + third.split()[6:] == ["3", "192", "complete", "2", "ranks:", "pp2", "newest"]
        assert third.split()[2] in ("2001-09-09", "2001-09-08")
        assert last.split()[:2] + last.split()[4:] == ["10", "-", "2.5", "kB", "unfinished", "-"]
        assert told.err == ""


def test_list_as_json(run: Path, one: Path, capsys: Capture, tmp_path: Path) -> None:
    os.utime(one / "manifest.json", (1e9, 1e9))
    assert checkpoint("list", run, "--json", "-") == 0
    told = capsys.readouterr()
    assert "newest" in told.err
    assert checkpoint("list", run, "--json", tmp_path / "list.json") == 0
    assert (tmp_path / "list.json").read_text() == told.out
    *_, last = json.loads(told.out)["checkpoints"]
    assert last == {
        "path": str(one), "step": 3, "state": "complete", "newest": True, "samples": 12, "tokens": 192,
        "written": "2001-09-09T01:46:40+00:00", "bytes": sum(file.stat().st_size for file in one.iterdir()),
        "ranks": 2, "layout": "pp2", "wrong": [],
    }  # fmt: skip


def test_list_tells_what_is_wrong_at_a_glance(run: Path, one: Path, capsys: Capture) -> None:
    (one / "__0_0.distcp").write_bytes(b"short")
    flip_byte(one.with_name("step-00000002") / "state.json")
    (one.with_name("step-00000001") / "manifest.json").write_text('{"format": 99, "files": {}}')
    shutil.copytree(one, one.with_name("step-00000004"))
    (one.with_name("step-00000004") / "manifest.json").unlink()
    (one.with_name("step-00000005")).mkdir()
    assert checkpoint("list", run) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    for line, expected in zip(
        lines,
        [
            "  has format 99; this version of trine reads format 4: use the version that wrote it, or begin anew in another run.directory",
            "  state.json differs from what was written",
            "  __0_0.distcp has 5 bytes instead of ",
            "  manifest.json is missing",
            "  manifest.json is missing; ...",
        ],
        strict=True,
    ):
        assert expected in line


def test_list_needs_nothing_heavy(written: Path) -> None:
    code = (
        f"import sys; from trine.launch.cli import main; main(['checkpoint', 'list', {str(written)!r}]); "
        "print({'torch', 'numpy', 'pydantic', 'yaml', 'tqdm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pp2  newest" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"
