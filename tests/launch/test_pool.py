"""The pool of rank processes: what comes back, how a failing rank is told, and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from trine.configs.errors import RunError, UsageError
from trine.launch.pool import RankPool

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Two workers at most; those of a job that failed are replaced by the next one."""
    with RankPool(seconds=100, quiet=True) as pool:
        yield pool


def test_values_come_back_by_rank(pool: RankPool) -> None:
    first, second = pool.run("faults:values", 2, factor=2.0)
    assert first["total"].item() == second["total"].item() == 6.0
    assert torch.equal(second["bf16"], torch.ones(3, dtype=torch.bfloat16))
    assert (first["plain"], second["plain"]) == ([0, "text", None, (1, 2.5)], [1, "text", None, (1, 2.5)])


def test_workers_are_used_again(pool: RankPool) -> None:
    assert pool.run("faults:process_id", 2) == pool.run("faults:process_id", 2)
    assert pool.run("faults:process_id", 1) == pool.run("faults:process_id", 2)[:1]


def test_a_job_that_hangs_is_ended(
    pool: RankPool, monkeypatch: pytest.MonkeyPatch, assert_gone: Callable[[list[int]], None]
) -> None:
    """However fast the machine, the job sleeps for longer than the limit."""
    workers = pool.run("faults:process_id", 2)
    monkeypatch.setattr(pool, "seconds", 0.5)
    with pytest.raises(RunError, match=r"^no answer from rank 0, 1 of 2 within 0\.5 s$"):
        pool.run("faults:fail", 2, how="late")
    assert_gone(workers)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("mistake", "rank 1 of 2 failed: KeyError: 'absent'"),
        ("killed", "rank 1 of 2 was killed by signal 9 (SIGKILL), as happens when memory runs out"),
    ],
)
def test_the_rank_that_failed_is_named_and_not_the_one_that_waited(pool: RankPool, how: str, sentence: str) -> None:
    with pytest.raises(RunError) as error:
        pool.run("faults:fail", 2, how=how)
    assert str(error.value) == sentence
    notes = "".join(getattr(error.value, "__notes__", []))
    assert ("Traceback" in notes) == (how == "mistake")


def test_sentences_of_a_rank_are_kept(pool: RankPool) -> None:
    with pytest.raises(UsageError, match=r"^train\.steps=0 is too few: use more$"):
        pool.run("faults:fail", 1, how="usage")
    with pytest.raises(RunError, match=r"^rank 0 of 1 failed: the loss is not finite$"):
        pool.run("faults:fail", 1, how="run")


def test_workers_do_not_outlive_the_process_that_started_them(
    tmp_path: Path, repository: Path, assert_gone: Callable[[list[int]], None]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import time\nfrom trine.launch.pool import RankPool\n"
        "if __name__ == '__main__':\n"
        "    print(*RankPool(quiet=True).run('faults:process_id', 2), flush=True)\n"
        "    time.sleep(300)\n"
    )
    paths = [str(repository / "tests" / "support"), *filter(None, sys.path)]
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    ) as parent:  # fmt: skip
        assert parent.stdout
        workers = [int(word) for word in parent.stdout.readline().split()]
        parent.send_signal(signal.SIGKILL)
    assert len(workers) == 2
    assert_gone(workers)
