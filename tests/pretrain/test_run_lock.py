"""One run at a time in a run directory: real processes that live, are killed, stopped or cut off, and that race."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from holding import Process

from trine.configs.errors import UsageError
from trine.pretrain import run_lock
from trine.pretrain.run_lock import LOCK, RunLock

pytestmark = pytest.mark.timeout(120)

BEAT_S = 0.4
DEADLINE_S = 40.0
ELSEWHERE = {
    "token": "ab" * 16, "host": "node7", "machine": "another boot", "pid": 4711, "pid_started": 12.0, "job": None
}  # fmt: skip


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Process] = []

    def one(**environment: str) -> Process:
        started.append(Process(BEAT_S, tmp_path / f"log-{len(started)}", environment))
        return started[-1]

    yield one
    for process in started:
        process.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def lock_of(run: Path) -> dict[str, Any]:
    lock: dict[str, Any] = json.loads((run / LOCK).read_text())
    return lock


def leave(run: Path, content: dict[str, Any] | bytes) -> Path:
    """Write a lock by hand."""
    run.mkdir(exist_ok=True)
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (run / "by hand").write_bytes(data)
    (run / "by hand").replace(run / LOCK)
    return run / LOCK


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def test_a_second_run_is_refused_while_the_first_lives(start: Start, run: Path) -> None:
    first, second = start(), start()
    assert first.does(f"acquire {run}") == "done"
    told = second.does(f"acquire {run}")
    assert re.fullmatch(
        rf"UsageError: run\.directory={run} is in use by process {first.popen.pid} on host \S+: wait for it, stop it "
        rf"with 'touch {run}/stop', or choose another run\.directory",
        told,
    )
    assert first.does("check") == "done"
    assert first.does("release") == "done"
    assert list(run.iterdir()) == []
    assert second.does(f"acquire {run}") == "done"
    assert lock_of(run)["pid"] == second.popen.pid


def test_a_killed_run_makes_way_at_once_on_its_own_host(start: Start, run: Path) -> None:
    first, second = start(), start()
    assert first.does(f"acquire {run}") == "done"
    first.popen.kill()
    wait_until(lambda: "State:\tZ" in Path(f"/proc/{first.popen.pid}/status").read_text())
    assert second.does(f"acquire {run}") == "done"
    assert second.log.read_text().startswith(
        f"INFO run.directory={run} was left locked by process {first.popen.pid} on host "
    )
    assert "sign of life" not in second.log.read_text()


def test_a_later_process_with_the_same_id_is_another(start: Start, run: Path) -> None:
    first, second = start(), start()
    assert first.does(f"acquire {run}") == "done"
    leave(run, lock_of(run) | {"pid_started": 1.0})
    assert second.does(f"acquire {run}") == "done"


@pytest.mark.parametrize("clock", [1.0, 4e9], ids=["past", "future"])
def test_a_holder_elsewhere_that_gives_no_sign_of_life(start: Start, run: Path, clock: float) -> None:
    os.utime(leave(run, ELSEWHERE | {"job": "12.0", "beat": 7}), (clock, clock))
    process = start()
    assert process.does(f"acquire {run}") == "done"
    assert process.log.read_text().splitlines() == [
        f"WARNING run.directory={run} is locked by process 4711 on host node7 (Slurm job 12.0): 1 s for a sign of life",
        f"WARNING run.directory={run} is taken over from process 4711 on host node7 (Slurm job 12.0): no sign of life",
    ]
    assert process.does("check") == "done"


@pytest.mark.parametrize("clock", [1.0, 4e9], ids=["past", "future"])
def test_a_holder_elsewhere_that_lives(start: Start, run: Path, clock: float) -> None:
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(BEAT_S / 2):
            count += 1
            os.utime(leave(run, ELSEWHERE | {"job": "12.0", "beat": count}), (clock, clock))

    leave(run, ELSEWHERE | {"job": "12.0", "beat": 0})
    holder = threading.Thread(target=beat)
    holder.start()
    try:
        told = start().does(f"acquire {run}")
    finally:
        ended.set()
        holder.join()
    assert told.startswith(f"UsageError: run.directory={run} is in use by process 4711 on host node7 (Slurm job 12.0)")
    assert lock_of(run)["token"] == ELSEWHERE["token"]


@pytest.mark.parametrize("content", [b"", b'{"token": "ab', b"null", b"\xff\x00"])
def test_a_garbled_lock_is_taken_over(start: Start, run: Path, content: bytes) -> None:
    leave(run, content)
    process = start()
    assert process.does(f"acquire {run}") == "done"
    assert "is taken over from a process that wrote no readable lock" in process.log.read_text()
    assert lock_of(run)["pid"] == process.popen.pid


def test_a_stopped_run_finds_that_it_has_lost_its_directory(start: Start, run: Path) -> None:
    first, second = start(), start()
    assert first.does(f"acquire {run}") == "done"
    first.popen.send_signal(signal.SIGSTOP)
    assert second.does(f"acquire {run}") == "done"
    first.popen.send_signal(signal.SIGCONT)
    assert first.does("check").startswith(
        f"RunError: another run has taken over run.directory={run}, process {second.popen.pid} on host "
    )
    wait_until(lambda: "ERROR another run has taken over" in first.log.read_text())
    assert first.does("release") == "done"
    beat = lock_of(run)["beat"]
    wait_until(lambda: lock_of(run)["beat"] > beat + 1)
    assert lock_of(run)["pid"] == second.popen.pid
    assert second.does("check") == "done"


def test_a_job_that_slurm_starts_again_takes_over_from_its_former_start(start: Start, run: Path) -> None:
    first, second = start(SLURM_JOB_ID="7"), start(SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert first.does(f"acquire {run}") == "done"
    assert lock_of(run)["job"] == "7.0"
    assert second.does(f"acquire {run}") == "done"
    assert "Slurm has started this job again" in second.log.read_text()
    wait_until(lambda: "ERROR another run has taken over" in first.log.read_text())
    assert first.does("check").startswith("RunError: another run has taken over")
    other = start(SLURM_JOB_ID="8", SLURM_RESTART_COUNT="2")
    assert "(Slurm job 7.1): wait for it" in other.does(f"acquire {run}")


def test_a_lock_that_is_removed_by_hand_is_missed(start: Start, run: Path) -> None:
    process = start()
    assert process.does(f"acquire {run}") == "done"
    (run / LOCK).unlink()
    assert process.does("check").startswith(f"RunError: {run / LOCK} is gone or cannot be read")


def test_a_failing_file_system_does_not_end_the_run(start: Start, run: Path) -> None:
    process = start()
    assert process.does(f"acquire {run}") == "done"
    (run / LOCK).unlink()
    (run / LOCK).mkdir()
    wait_until(lambda: "cannot be written" in process.log.read_text())
    time.sleep(3 * BEAT_S)
    assert process.log.read_text().count("cannot be written") == 1
    assert process.does("check").startswith("RunError")


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
def test_of_many_that_race_one_wins(start: Start, tmp_path: Path, stale: bool) -> None:
    processes = [start() for _ in range(4)]
    for turn in range(4):
        run = tmp_path / f"run-{turn}"
        if stale:
            leave(run, ELSEWHERE | {"beat": turn})
        for process in processes:
            process.ask(f"acquire {run}")
        answers = [process.answer() for process in processes]
        assert sorted(answer.partition(":")[0] for answer in answers) == ["UsageError"] * 3 + ["done"], answers
        winner = processes[answers.index("done")]
        assert winner.does("check") == "done"
        assert lock_of(run)["pid"] == winner.popen.pid
        assert winner.does("release") == "done"
        assert list(run.iterdir()) == []


def test_many_race_for_the_lock_of_a_killed_run(start: Start, tmp_path: Path) -> None:
    processes = [start() for _ in range(4)]
    for turn in range(3):
        run, killed = tmp_path / f"run-{turn}", start()
        assert killed.does(f"acquire {run}") == "done"
        killed.close()
        for process in processes:
            process.ask(f"acquire {run}")
        answers = [process.answer() for process in processes]
        assert sorted(answer.partition(":")[0] for answer in answers) == ["UsageError"] * 3 + ["done"], answers
        assert processes[answers.index("done")].does("release") == "done"


def test_a_name_is_given_and_taken_away_once(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    together = threading.Barrier(8)

    def give(number: int) -> bool:
        own = tmp_path / f"own-{number}"
        own.write_text(str(number))
        together.wait()
        return run_lock._give_name(own, path)

    def take(number: int) -> bool:
        together.wait()
        return run_lock._take_away(path, lambda _: True)

    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            given = list(pool.map(give, range(8)))
            assert given.count(True) == 1
            assert path.read_text() == str(given.index(True))
            assert list(pool.map(take, range(8))).count(True) == 1
            assert not path.exists()


def test_who_comes_too_late_to_take_over_puts_the_new_lock_back(run: Path) -> None:
    path = leave(run, ELSEWHERE | {"beat": 1})
    number = path.stat().st_ino
    # What was seen to be stale is replaced just before it is taken away.
    looks = iter([True, False])
    assert not run_lock._take_away(path, lambda _: next(looks))
    assert path.stat().st_ino == number
    assert list(run.iterdir()) == [path]


def test_a_file_system_without_hard_links(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    leave(run, ELSEWHERE | {"beat": 1})
    with RunLock.acquire(run, beat_seconds=BEAT_S) as lock:
        with pytest.raises(UsageError, match="is in use by process"):
            RunLock.acquire(run, beat_seconds=BEAT_S)
        lock.check()
    assert list(run.iterdir()) == []


@pytest.mark.parametrize("place", ["file/run", "run"])
def test_a_directory_that_cannot_be_locked(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run" / LOCK).mkdir(parents=True)
    with pytest.raises(UsageError, match=rf"run\.directory={tmp_path / place} cannot be locked \(.+\): choose one"):
        RunLock.acquire(tmp_path / place, beat_seconds=BEAT_S)
