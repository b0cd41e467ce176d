"""The real worker with something short in place of the pretraining: ``STANDIN`` says what."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from trine.configs.errors import RunError, UsageError
from trine.launch import worker
from trine.launch.lifeline import end_with_parent

if TYPE_CHECKING:
    from trine.configs.schema import Config
    from trine.pretrain.place import Place


def succeed(config: Config, place: Place) -> None:
    """Say where."""
    print(f"rank {place.rank} reads {config.data.directory}")
    print(f"rank {place.rank} has {os.environ['OMP_NUM_THREADS']} threads", file=sys.stderr)


def fail(config: Config, place: Place) -> None:
    """Rank 1 fails while rank 0 does something else."""
    if place.rank == 0:
        _note_and_sleep(config)
    while not list(config.run.directory.parent.glob("pid-*")):
        time.sleep(0.05)
    _note(config, os.getpid())
    raise RunError("the loss is not finite\nsecond line")


def fail_twice(config: Config, place: Place) -> None:
    """Each of the first two lives makes a checkpoint, and fails when both ranks have seen it."""
    checkpoints = config.run.directory / "checkpoints"
    life = len(list(checkpoints.glob("step-*"))) + 1
    if life > 2:
        return
    (config.run.directory / f"seen-{life}-{place.rank}").touch()
    while len(list(config.run.directory.glob(f"seen-{life}-*"))) < 2:
        time.sleep(0.05)
    if place.rank == 0:
        _note_and_sleep(config)
    (checkpoints / f"step-{life:08d}").mkdir(parents=True)
    raise RunError(f"life {life}")


def refuse(config: Config, place: Place) -> None:
    """Every rank finds the same mistake of the user."""
    raise UsageError(f"train.steps={config.train.steps} is too few: use more")


def crash(config: Config, place: Place) -> None:
    """A mistake of the program, after a child was started that would stay and an exit that would hang."""
    atexit.register(time.sleep, 300)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,), daemon=True)
    child.start()
    assert child.pid
    _note(config, child.pid)
    print(1 // 0)


def die_in_collective(config: Config, place: Place) -> None:
    """Rank 1 is killed while rank 0 waits for it in an all-reduce."""
    import torch
    import torch.distributed as dist

    _note(config, os.getpid())
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    if place.rank == 1:
        _note(config, subprocess.Popen(["sleep", "300"]).pid)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def meet(config: Config, place: Place) -> None:
    """All ranks add their numbers."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor(place.rank + 1)
    dist.all_reduce(total)
    print(f"total {total.item()}")
    dist.destroy_process_group()


def wait(config: Config, place: Place) -> None:
    """Sleep until somebody ends it, beside processes such as those that write checkpoints."""
    for method in ("spawn", "fork"):
        multiprocessing.get_context(method).Process(target=_note_and_sleep, args=(config,)).start()
    _note_and_sleep(config)


def _note_and_sleep(config: Config) -> None:
    _note(config, os.getpid())
    time.sleep(300)


def _note(config: Config, pid: int) -> None:
    (config.run.directory.parent / f"pid-{pid}").touch()


if __name__ == "__main__":
    sys.exit(worker.main(train=globals()[os.environ["STANDIN"]]))
elif __name__ == "__mp_main__":
    end_with_parent()
