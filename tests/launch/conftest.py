"""A recipe and stand-in ranks for the tests of the launcher."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

RECIPE = """\
model:
  hidden_size: 32
  ffn_hidden_size: 64
  stack: [{{mixer: attention, layers: 2, heads: 4}}]
train: {{steps: 2, global_batch_size: 2, sequence_length: 16}}
data: {{directory: {folder}/data}}
run: {{directory: {folder}/run}}
"""

DEADLINE_S = 40.0


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A small recipe whose data and run are in the test's own folder."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Choose what ``python -m standin_ranks`` does in place of the pretraining, for this process's children."""
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])))

    def choose(name: str) -> None:
        monkeypatch.setenv("STANDIN", name)

    return choose


@pytest.fixture
def pids(tmp_path: Path) -> Callable[[int], list[int]]:
    """Wait until the stand-ins have noted ``count`` processes, and return their ids."""

    def wait(count: int) -> list[int]:
        _wait_until(lambda: len(list(tmp_path.glob("pid-*"))) == count)
        return [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]

    return wait


@pytest.fixture
def assert_gone() -> Callable[[list[int]], None]:
    """Fail unless the processes end."""

    def check(processes: list[int]) -> None:
        _wait_until(lambda: not any(map(_is_running, processes)))

    return check


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
