"""Which of several failed ranks is named."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from trine.launch.failures import recorded_failures, root_cause

START = 1_700_000_000
CLOSED = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711"
KILL, TERM = -signal.SIGKILL, -signal.SIGTERM

Failed = Callable[..., ProcessFailure]


@pytest.fixture
def failed(tmp_path: Path) -> Failed:
    """A failure as torch's launcher reads it: an exit code, and the file in which the rank wrote its error."""

    def make(exitcode: int, message: str = "", after: float = 0.0, trace: str = "") -> ProcessFailure:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        if message:
            extra = {"py_callstack": trace or message, "timestamp": str(int(START + after))}
            path.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
            os.utime(path, (START + after, START + after))
        failure = ProcessFailure(local_rank=0, pid=4711, exitcode=exitcode, error_file=str(path))
        failure.timestamp = int(START + after)
        return failure

    return make


def test_a_killed_rank_comes_before_those_that_lost_it(failed: Failed) -> None:
    cause = root_cause({0: failed(1, CLOSED), 1: failed(KILL), 2: failed(TERM)})
    assert cause.rank == 1
    assert cause.how.startswith("was killed by signal 9 (SIGKILL)")


def test_an_error_comes_before_those_that_lost_their_peer(failed: Failed) -> None:
    cause = root_cause({0: failed(1, CLOSED), 1: failed(1, "RunError: the disk is full\nmore", after=0.2)})
    assert (cause.rank, cause.how) == (1, "failed: the disk is full")


def test_a_lost_peer_is_seen_through_the_error_that_wraps_it(failed: Failed) -> None:
    wrapped = failed(1, "RunError: step 3 failed", trace=f"{CLOSED}\nThe above exception was the direct cause of")
    assert root_cause({0: wrapped, 1: failed(1, "ValueError: wrong", after=0.2)}).rank == 1


def test_the_earliest_of_equals_is_found_within_a_second(failed: Failed) -> None:
    errors = {0: failed(1, "ValueError: b", after=0.75), 1: failed(1, "ValueError: a", after=0.25)}
    assert root_cause(errors).how == "failed: ValueError: a"


def test_a_rank_that_the_launcher_had_to_kill_is_no_cause(failed: Failed) -> None:
    assert root_cause({1: failed(1, "ValueError: wrong"), 0: failed(KILL, after=30)}).rank == 1


def test_a_rank_that_somebody_terminated_is_the_cause(failed: Failed) -> None:
    assert root_cause({1: failed(TERM), 0: failed(1, CLOSED)}).rank == 1
    assert root_cause({0: failed(1, CLOSED), 1: failed(TERM)}).rank == 0


def test_a_usage_error_keeps_its_lines(failed: Failed) -> None:
    assert root_cause({0: failed(2, "UsageError: one\ntwo")}).usage == "one\ntwo"
    assert root_cause({0: failed(2)}).usage is None


def test_an_exit_without_a_message_is_told_by_its_code(failed: Failed) -> None:
    assert root_cause({0: failed(7)}).how == "ended with exit code 7 and no message"


def test_what_ranks_recorded_when_a_signal_ended_the_launch(tmp_path: Path) -> None:
    """Rank 1 could not save; rank 0 lost it; rank 2 was killed while it wrote; rank 3 found wrong use."""
    texts = {0: CLOSED, 1: "RunError: checkpoint x could not be written", 3: "UsageError: train.steps=0 is too few"}
    for rank in range(4):
        path = tmp_path / "run_abc" / "attempt_0" / str(rank) / "error.json"
        path.parent.mkdir(parents=True)
        error = {"message": texts.get(rank), "extraInfo": {"py_callstack": texts.get(rank), "timestamp": "1"}}
        path.write_text(json.dumps({"message": error}) if rank in texts else '{"mess')
    found = recorded_failures(tmp_path)
    assert {rank: failure.exitcode for rank, failure in found.items()} == {1: 1, 3: 2}
    assert root_cause(found).how.startswith("failed: checkpoint x could not be written")
    assert recorded_failures(tmp_path / "none") == {}
