"""Ranks that stand still, die or are cut off, as real processes: who is named, where, and how all of them end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(240)

SCRIPT = Path(__file__).parent.parent / "support" / "hanging.py"
DEADLINE_S = 90.0
HOST = re.escape(socket.gethostname())


class Ranks:
    """The processes of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, scenario: str, world_size: int, seconds: float) -> None:
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        for rank in range(world_size):
            words = [scenario, rank, world_size, seconds, self.folder]
            with (self.folder / f"console-{rank}").open("w") as out, (self.folder / f"errors-{rank}").open("w") as errors:
                command = [sys.executable, str(SCRIPT), *map(str, words)]
                self.processes.append(subprocess.Popen(command, stdout=out, stderr=errors, text=True, env=environment))

    def wait_running(self) -> None:
        """Wait until every rank has marked itself as running."""
        self._wait(lambda: len(list(self.folder.glob("running-*"))) == len(self.processes))

    def codes(self, *ranks: int) -> list[int | None]:
        """The exit codes of ``ranks``, by default of all, when they have ended."""
        chosen = [self.processes[rank] for rank in ranks or range(len(self.processes))]
        self._wait(lambda: all(process.poll() is not None for process in chosen))
        return [process.returncode for process in chosen]

    def console(self, rank: int) -> str:
        return (self.folder / f"console-{rank}").read_text()

    def log(self, rank: int) -> str:
        return (self.folder / f"rank-{rank}.log").read_text()

    def send(self, rank: int, number: signal.Signals) -> None:
        self.processes[rank].send_signal(number)

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            if time.monotonic() > deadline:
                told = [path.read_text() for path in sorted(self.folder.glob("*-?")) if path.is_file()]
                pytest.fail("it did not come about; the ranks told:\n" + "\n".join(told))
            time.sleep(0.05)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    run = Ranks(tmp_path)
    yield run
    run.close()


def test_a_rank_that_sleeps_is_named_once_and_all_end(ranks: Ranks) -> None:
    ranks.start("sleeps", 2, seconds=2)
    assert ranks.codes() == [1, 1]
    (line,) = ranks.console(0).splitlines()
    assert re.fullmatch(
        rf"console: rank 1 on host {HOST} hangs: in phase 'data' of step 3 for \d+ s, while the others wait for it in "
        "'forward and backward'; last step that all ranks finished: 2",
        line,
    )
    assert ranks.console(1) == ""
    sentence = line.removeprefix("console: ")
    for rank, where in ((0, "all_reduce"), (1, "sleeps")):
        log = ranks.log(rank)
        assert f"ERROR trine.pretrain.watch.hang: {sentence}" in log
        assert "most recent call first" in log
        assert where in log
        assert f"rank {rank} ends: {sentence}" in (ranks.folder / f"errors-{rank}").read_text()


def test_a_stopped_rank_does_not_answer(ranks: Ranks) -> None:
    ranks.start("runs", 3, seconds=2)
    ranks.wait_running()
    ranks.send(1, signal.SIGSTOP)
    assert ranks.codes(0, 2) == [1, 1]
    told = re.compile(
        rf"console: rank 1 on host {HOST} does not answer \(stopped, dead or cut off\); it was last seen in phase "
        r"'(data|forward and backward)' of step \d+; last step that all ranks finished: \d+\n"
    )
    assert told.fullmatch(ranks.console(0))
    assert ranks.console(2) == ""
    assert "does not answer" in ranks.log(2)


def test_a_rank_that_holds_the_interpreter_does_not_answer(ranks: Ranks) -> None:
    ranks.start("holds_the_interpreter", 2, seconds=1)
    assert ranks.codes(0) == [1]
    assert f"rank 1 on host {socket.gethostname()} does not answer" in ranks.console(0)
    assert re.search("last step that all ranks finished: [12]$", ranks.console(0))


def test_the_rank_that_holds_the_store_is_stopped(ranks: Ranks) -> None:
    ranks.start("runs", 2, seconds=2)
    ranks.wait_running()
    ranks.send(0, signal.SIGSTOP)
    assert ranks.codes(1) == [1]
    assert re.fullmatch(
        r"console: the host of rank 0 does not answer, nor does the run's store there, 127\.0\.0\.1:\d+ \(stopped, "
        rf"dead or cut off\); rank 1 on host {HOST} waits in phase 'forward and backward' of step \d+ for \d+ s; last "
        r"step that it finished: \d+\n",
        ranks.console(1),
    )
    assert "all_reduce" in ranks.log(1)


def test_ranks_that_move_are_left_alone(ranks: Ranks) -> None:
    ranks.start("moves", 2, seconds=3)
    assert ranks.codes() == [0, 0]
    assert ranks.console(0) == ranks.console(1) == "finished\n"
    assert ranks.log(0) == ranks.log(1) == ""


def test_a_run_of_one_process(ranks: Ranks) -> None:
    ranks.start("sleeps", 1, seconds=1)
    assert ranks.codes() == [1]
    assert re.fullmatch(
        rf"console: rank 0 on host {HOST} hangs: in phase 'data' of step 3 for 1 s; last step that it finished: 2\n",
        ranks.console(0),
    )
    assert "sleeps" in ranks.log(0)


def test_a_process_that_was_stopped_itself_counts_anew(ranks: Ranks) -> None:
    ranks.start("waits_for_test", 1, seconds=3)
    ranks.wait_running()
    ranks.send(0, signal.SIGSTOP)
    time.sleep(5)
    ranks.send(0, signal.SIGCONT)
    time.sleep(0.5)
    (ranks.folder / "go on").touch()
    assert ranks.codes() == [0]
    assert ranks.console(0) == "finished\n"


def test_a_rank_ends_also_where_nobody_takes_up_what_it_tells(ranks: Ranks) -> None:
    ranks.start("sleeps_before_a_dead_console", 1, seconds=1)
    assert ranks.codes() == [1]
    assert ranks.console(0) == ""
    assert "sleeps_before_a_dead_console" in ranks.log(0)
