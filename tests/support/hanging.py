"""One rank of a run that hangs, as a process: ``python hanging.py SCENARIO RANK WORLD_SIZE SECONDS FOLDER``.

It stands in for the training loop: data, an all-reduce, the next step. MASTER_ADDR and MASTER_PORT are set.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from trine.configs.errors import RunError
from trine.pretrain.place import Place
from trine.pretrain.watch.hang import HangWatchdog
from trine.pretrain.watch.pulse import Pulse

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=5)


class Rank:
    """What a scenario works with."""

    def __init__(self, rank: int, world_size: int, seconds: float, folder: Path) -> None:
        self.rank, self.seconds, self.folder = rank, seconds, folder
        self.pulse = Pulse()
        self.place = Place(rank, world_size, rank, world_size, "local")

    def step(self, step: int, work: Callable[[], object] = lambda: None) -> None:
        """A step in which the data takes ``work``."""
        self.pulse.enter("data", step)
        work()
        self.pulse.enter("forward and backward", step)
        if self.place.world_size > 1:
            dist.all_reduce(torch.ones(1))
        self.pulse.step_done(step)

    def mark(self, name: str) -> None:
        """Tell the test how far this rank has come."""
        (self.folder / f"{name}-{self.rank}").touch()

    def wait_for(self, name: str) -> None:
        """Wait for the test."""
        while not (self.folder / name).exists():
            time.sleep(0.02)


def sleeps(rank: Rank) -> None:
    """The last rank sleeps over the data of step 3."""
    for step in (1, 2):
        rank.step(step)
    rank.step(3, lambda: time.sleep(300) if rank.rank == rank.place.world_size - 1 else None)


def holds_the_interpreter(rank: Rank) -> None:
    """Rank 1 computes in C and lets no other thread of Python run."""
    rank.step(1)
    rank.step(2, lambda: time.sleep(rank.seconds / 2))
    rank.step(3, lambda: sum(range(10**15)) if rank.rank == 1 else None)


def runs(rank: Rank) -> None:
    """Steps until the test does something to a rank."""
    step, started = 0, time.monotonic()
    while True:
        step += 1
        rank.step(step, lambda: time.sleep(0.05))
        if time.monotonic() > started + rank.seconds:
            rank.mark("running")


def moves(rank: Rank) -> None:
    """Rank 1 is slow in every way that is allowed, and rank 0 waits for it."""
    works = rank.rank == 1

    def microbatches() -> None:
        for _ in range(10):
            time.sleep(rank.seconds / 5)
            rank.pulse.enter("data", 2)

    rank.step(1)
    rank.step(2, microbatches if works else lambda: None)
    rank.step(3, lambda: time.sleep(rank.seconds / 2) if works else None)
    if works:
        rank.pulse.enter("save", 3)
        time.sleep(1.5 * rank.seconds)
    rank.step(4)


def waits_for_test(rank: Rank) -> None:
    """One step that lasts as long as the test wants."""
    rank.pulse.enter("data", 1)
    rank.mark("running")
    rank.wait_for("go on")


def sleeps_before_a_dead_console(rank: Rank) -> None:
    """As ``sleeps``; what is told goes where nobody takes it up."""
    sleeps(rank)


def main(scenario: str, rank: int, world_size: int, seconds: float, folder: Path) -> None:
    """Run ``scenario`` under the watch."""
    one = Rank(rank, world_size, seconds, folder)
    log = folder / f"rank-{rank}.log"

    def tell(line: str) -> None:
        if scenario == "sleeps_before_a_dead_console":
            time.sleep(300)
        print(f"console: {line}", flush=True)

    def end(error: RunError) -> None:
        print(f"rank {rank} ends: {error}", file=sys.stderr, flush=True)
        os._exit(1)

    address = None
    if world_size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    with HangWatchdog(one.pulse, one.place, seconds, address, tell=tell, end=end, log=log):
        globals()[scenario](one)
    print("finished", flush=True)
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    faulthandler.enable()
    _, name, *numbers, directory = sys.argv
    main(name, int(numbers[0]), int(numbers[1]), float(numbers[2]), Path(directory))
