"""Which ranks are named when a run hangs, from what all of them have told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from trine.pretrain.watch.pulse import Pulse
from trine.pretrain.watch.verdict import Record, lost_store, verdict

WAITS = Record("n1", "forward and backward", step=17, turn=8, finished=16, seconds=300.4, overdue=True, beat=60)
READS = replace(WAITS, host="n2", phase="data", seconds=301.2)
MOVES = replace(WAITS, host="n2", phase="data", seconds=0.1, overdue=False)


def told(*records: Record, silent: tuple[int, ...] = (), missing: tuple[int, ...] = ()) -> str | None:
    known = {rank: record for rank, record in enumerate(records) if rank not in missing}
    return verdict(known, silent, len(records))


def test_the_rank_that_reads_while_others_wait() -> None:
    assert told(WAITS, WAITS, READS) == (
        "rank 2 on host n2 hangs: in phase 'data' of step 17 for 301 s, while the others wait for it in 'forward and "
        "backward'; last step that all ranks finished: 16"
    )


def test_nobody_is_named_while_the_rank_behind_moves() -> None:
    assert told(WAITS, WAITS, MOVES) is None
    assert told(WAITS, replace(WAITS, overdue=False)) is None
    assert told(replace(WAITS, turn=9), replace(WAITS, phase="save", overdue=False)) is None


def test_a_rank_that_waits_for_nobody_hangs_even_where_another_moves() -> None:
    line = told(WAITS, MOVES, READS)
    assert line is not None
    assert line.startswith("rank 2 on host n2 hangs: in phase 'data'")


def test_the_rank_at_an_earlier_step_or_in_an_earlier_phase() -> None:
    later = replace(WAITS, step=18, turn=9, finished=17)
    line = told(later, replace(WAITS, phase="save"), later)
    assert line is not None
    assert line.startswith("rank 1 on host n1 hangs: in phase 'save' of step 17")
    assert line.endswith("last step that all ranks finished: 16")
    line = told(replace(WAITS, phase="agreement"), WAITS)
    assert line is not None
    assert line.startswith("rank 1 on host n1 hangs: in phase 'forward and backward'")


def test_steps_that_are_repeated_after_a_roll_back_come_later() -> None:
    line = told(replace(READS, step=11, turn=9), replace(WAITS, phase="load", step=17, turn=8), MOVES)
    assert line is not None
    assert line.startswith("rank 0 on host n2 hangs")  # it waits for nobody
    line = told(replace(WAITS, step=11, turn=9), replace(WAITS, phase="load", step=17, turn=8))
    assert line is not None
    assert line.startswith("rank 1 on host n1 hangs: in phase 'load' of step 17")


def test_several_ranks_and_all_of_them() -> None:
    assert told(READS, WAITS, replace(READS, host="n3")) == (
        "ranks 0 and 2 on hosts n2 and n3 hang: in phase 'data' of step 17 for 301 s, while the others wait for them in "
        "'forward and backward'; last step that all ranks finished: 16"
    )
    assert told(WAITS, WAITS) == (
        "all 2 ranks hang: in phase 'forward and backward' of step 17 for 300 s, and none is behind the others; last "
        "step that all ranks finished: 16"
    )
    assert told(READS) == "rank 0 on host n2 hangs: in phase 'data' of step 17 for 301 s; last step that it finished: 16"


def test_ranks_that_do_not_answer_come_first() -> None:
    last = replace(WAITS, phase="optimizer", step=16, turn=7, finished=15)
    assert told(WAITS, last, READS, silent=(1,)) == (
        "rank 1 on host n1 does not answer (stopped, dead or cut off); it was last seen in phase 'optimizer' of step 16; "
        "last step that all ranks finished: 15"
    )
    assert told(WAITS, last, silent=(1,), missing=(1,)) == (
        "rank 1 does not answer (stopped, dead or cut off); it was never seen by the others; last step that all those "
        "finished: 16"
    )
    line = told(*[WAITS] * 12, silent=tuple(range(2, 12)))
    assert line is not None
    assert line.startswith("ranks 2, 3, 4, 5, 6, 7, 8, 9 and 2 more on host n1 do not answer (stopped, dead or cut off)")


def test_a_rank_that_has_ended_is_waited_for_in_vain() -> None:
    assert told(WAITS, replace(READS, ended=True, overdue=False)) == (
        "rank 1 on host n2 has ended while others wait; it was last seen in phase 'data' of step 17; last step that all "
        "ranks finished: 16"
    )


def test_a_rank_that_can_ask_nobody() -> None:
    assert lost_store("n0:29500", 3, replace(WAITS, finished=0)) == (
        "the host of rank 0 does not answer, nor does the run's store there, n0:29500 (stopped, dead or cut off); rank 3 "
        "on host n1 waits in phase 'forward and backward' of step 17 for 300 s; last step that it finished: none"
    )


@pytest.mark.parametrize("record", [WAITS, READS, replace(WAITS, ended=True)])
def test_records_travel(record: Record) -> None:
    assert Record.decode(record.encode().encode()) == record


def test_a_pulse_counts_steps_as_they_are_worked_on() -> None:
    pulse = Pulse()
    turns = []
    for phase, step in (("data", 1), ("data", 1), ("optimizer", 1), ("data", 2), ("load", 2), ("data", 1)):
        before = pulse.moment
        pulse.enter(phase, step)
        assert pulse.moment is not before
        turns.append(pulse.moment[2])
    assert turns == [1, 1, 1, 2, 2, 3]


def test_a_pulse_follows_batches() -> None:
    pulse, seen = Pulse(), []

    def batches() -> Iterator[int]:
        for number in range(2):
            seen.append(pulse.moment[:2])
            yield number

    for _ in pulse.through(batches(), "evaluation", 4):
        seen.append(pulse.moment[:2])
    assert seen == [("data", 4), ("evaluation", 4)] * 2
    assert pulse.moment[:2] == ("evaluation", 4)
