"""Jobs for the rank pool that are whole runs, as ``trine pretrain`` makes them."""

from __future__ import annotations

import json
import logging
import math
import time
from typing import Any

import torch

from trine.configs.checks import check_layout
from trine.configs.errors import RunError, UsageError
from trine.configs.loading import set_vocabulary
from trine.configs.schema import Config
from trine.data_pipeline.opening import read_prepared
from trine.parallel.topology import build_topology, local_device
from trine.pretrain.place import Place
from trine.pretrain.run_lock import HeldLocks, RunLock
from trine.pretrain.stopping import Stop
from trine.pretrain.trainer import Trainer


def trainer_of(rank: int, world_size: int, config: dict[str, Any]) -> Trainer:
    """The trainer of one rank."""
    run = Config.model_validate(config)
    prepared = read_prepared(run.data)
    run = set_vocabulary(run, prepared.vocabulary_size)
    topology = build_topology(check_layout(run, world_size), local_device(rank))
    return Trainer(run, topology, Place(rank, world_size, rank, world_size, "local"), prepared)


def pretrain(rank: int, world_size: int, *, config: dict[str, Any], own_data: dict[str, str] | None = None) -> None:
    """One rank's part in a run: what it writes is the result.

    ``own_data`` names, by rank, ranks that read a copy of the data of their own, as from a disk of their node.
    """
    if own_data and str(rank) in own_data:
        config["data"]["directory"] = own_data[str(rank)]
    trainer_of(rank, world_size, config).run()


def refused(rank: int, world_size: int, *, config: dict[str, Any]) -> str:
    """What a run says that all ranks must refuse or end alike; they live on for the next job."""
    try:
        pretrain(rank, world_size, config=config)
    except (UsageError, RunError) as error:
        return str(error)
    return "finished"


def faulty(
    rank: int, world_size: int, *, config: dict[str, Any], at: list[int], factor: float, times: int = 99
) -> tuple[str, list[str]]:
    """A run in which the last rank's gradients are multiplied by ``factor`` wherever a step begins after one of the
    numbers of samples in ``at``, the first ``times`` times; what came of it, and the warnings."""
    trainer = trainer_of(rank, world_size, config)
    _break_gradients(trainer, at, factor, times)
    return _run(trainer)


def stopped_after_going_back(rank: int, world_size: int, *, config: dict[str, Any], at: list[int]) -> str:
    """A run whose last rank has gradients that are not finite, and which is stopped as soon as it has gone back."""
    trainer = trainer_of(rank, world_size, config)
    _break_gradients(trainer, at, math.nan, 99)
    go_back = trainer._go_back

    def go_back_and_stop(*arguments: Any) -> None:
        go_back(*arguments)
        trainer.requests.seen = lambda: Stop.SIGNAL  # type: ignore[method-assign]

    trainer._go_back = go_back_and_stop  # type: ignore[method-assign]
    trainer.run()
    return "finished" if trainer.finished else "stopped"


def _break_gradients(trainer: Trainer, at: list[int], factor: float, times: int) -> None:
    left, last = [times], trainer.topology.layout.world_size - 1
    compute = trainer.engine.compute_gradients

    def faulty_gradients(*arguments: Any) -> float:
        loss = compute(*arguments)
        if trainer.topology.rank == last and trainer.progress.samples in at and left[0] > 0:
            left[0] -= 1
            for chunk in trainer.engine.chunks:
                for parameter in chunk.parameters():
                    parameter.main_grad.mul_(factor)
        return loss

    trainer.engine.compute_gradients = faulty_gradients  # type: ignore[method-assign,assignment]


def slow(rank: int, world_size: int, *, config: dict[str, Any], seconds: float) -> tuple[str, list[str]]:
    """A run whose last rank reads slowly; what came of it, and the warnings."""
    trainer = trainer_of(rank, world_size, config)
    training = trainer.data.training

    def slow_training(*arguments: Any) -> Any:
        for batch in training(*arguments):
            time.sleep(seconds if rank == world_size - 1 else 0)
            yield batch

    trainer.data.training = slow_training  # type: ignore[method-assign]
    return _run(trainer)


def parameters(rank: int, world_size: int, *, config: dict[str, Any]) -> list[torch.Tensor]:
    """The parameters of this rank in the newest checkpoint."""
    trainer = trainer_of(rank, world_size, config)
    found = trainer.saver.find()
    assert found is not None
    trainer.saver.load(found)
    trainer.data.close()
    trainer.engine.close()
    return [p.detach().clone() for chunk in trainer.engine.chunks for p in chunk.parameters()]


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _run(trainer: Trainer) -> tuple[str, list[str]]:
    warnings = _Warnings()
    logging.getLogger("trine").addHandler(warnings)
    try:
        trainer.run()
    except RunError as error:
        return str(error), warnings.lines
    finally:
        logging.getLogger("trine").removeHandler(warnings)
    return "finished", warnings.lines


def loses_checkpoints(rank: int, world_size: int, *, config: dict[str, Any], at_step: int) -> tuple[str, list[str]]:
    """A run whose folder of checkpoints is removed while that of ``at_step`` is written."""
    trainer = trainer_of(rank, world_size, config)
    begin = trainer.saver.begin

    def begin_and_lose(step: int, state: dict[str, Any]) -> None:
        begin(step, state)
        if step == at_step:
            folder = trainer.config.checkpoint_directory
            folder.rename(folder.with_name("elsewhere"))  # at once: files are being written in it

    trainer.saver.begin = begin_and_lose  # type: ignore[method-assign]
    return _run(trainer)


def loses_lock(rank: int, world_size: int, *, config: dict[str, Any], at_step: int) -> tuple[str, list[str]]:
    """A run whose folder another run takes over while it saves ``at_step``; another's checkpoint is on its way."""
    run = Config.model_validate(config).run.directory
    lock = RunLock.acquire(run, beat_seconds=0.1) if rank == 0 else None
    trainer = trainer_of(rank, world_size, config)
    trainer.lock = HeldLocks(lock) if lock else None
    trainer.saver._fence = lock.check if lock else lambda: None
    begin = trainer.saver.begin

    def begin_and_lose(step: int, state: dict[str, Any]) -> None:
        begin(step, state)
        if step == at_step and rank == 0:
            held = json.loads((run / "run.lock").read_text())
            (run / "run.lock").write_text(json.dumps(held | {"token": "0" * len(held["token"])}))
            (trainer.config.checkpoint_directory / "step-00000099.abc.writing").mkdir()
            deadline = time.monotonic() + 30
            while lock and not lock.lost and time.monotonic() < deadline:
                time.sleep(0.05)

    trainer.saver.begin = begin_and_lose  # type: ignore[method-assign]
    return _run(trainer)
