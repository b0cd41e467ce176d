"""One rank without our launcher: what it tells, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(60)

Standin = Callable[[str], None]
Pids = Callable[[int], list[int]]
AssertGone = Callable[[list[int]], None]


def rank(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "standin_ranks", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_ranks_of_a_launcher_that_is_not_ours_speak_for_themselves(
    recipe: Path, tmp_path: Path, standin: Standin, pids: Pids, assert_gone: AssertGone
) -> None:
    standin("crash")
    done = rank(recipe)
    log = tmp_path / "run" / "logs" / "rank-0.log"
    message = "integer division or modulo by zero"
    assert done.returncode == 1
    assert done.stderr == f"trine: rank 0 failed: ZeroDivisionError: {message}; see {log}\n"
    assert "Traceback" in log.read_text()
    assert_gone(pids(1))


@pytest.mark.parametrize(
    ("name", "override", "sentence"),
    [
        ("refuse", "train.steps=1", "train.steps=1 is too few: use more"),
        ("refuse", "train.step=1", "train.step is not a key; did you mean train.steps?"),
    ],
)
def test_mistakes_of_the_user(name: str, override: str, sentence: str, recipe: Path, standin: Standin) -> None:
    standin(name)
    done = rank(recipe, override)
    assert (done.returncode, done.stderr) == (2, f"trine: {sentence}\n")


def test_a_rank_alone_can_join_itself(recipe: Path, standin: Standin) -> None:
    standin("meet")
    done = rank(recipe)
    assert (done.returncode, done.stdout) == (0, "total 1\n")


def test_the_module_is_light_for_processes_that_import_it_again() -> None:
    code = "import sys, trine.launch.worker; print({'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
