"""Whether the numbers of a configuration fit together, and with the number of ranks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .data_checks import check_data, check_ramps
from .division_checks import check_pipeline, check_tensor
from .engine_checks import check_engine
from .errors import UsageError
from .fp8_checks import check_fp8
from .remedies import nearest_multiples
from .schema import Config, Optimizer, Parallel, Train
from .sequence_checks import check_exchange, check_sequence
from .stack_checks import check_stack
from .watch_checks import check_watch


@dataclass(frozen=True)
class Layout:
    """How the ranks of a run are divided: ``world_size`` = tensor x pipeline x context x data.

    ``num_microbatches`` is what each data-parallel rank takes through the pipeline per step.
    """

    world_size: int
    tensor: int
    pipeline: int
    virtual_pipeline: int
    context: int
    data: int
    num_microbatches: int


def check_config(config: Config) -> None:
    """Check everything that needs no world size. Raises UsageError with one sentence for the first mistake.

    The vocabulary takes part once ``model.vocabulary_size`` is known.
    """
    check_stack(config.model)
    check_tensor(config.model, config.parallel)
    check_data(config.data)
    check_ramps(config.train)
    check_sequence(config.model.stack, config.train, config.parallel)
    check_exchange(config.model.stack, config.parallel)
    check_pipeline(config.model.stack, config.parallel)
    _check_schedule(config.train, config.optimizer)
    check_watch(config.watch, config.checkpoint)
    check_fp8(config)
    check_engine(config)
    _check_places(config)


def _check_places(config: Config) -> None:
    places = {"run.directory": config.run.directory, "checkpoint.directory": config.checkpoint.directory}
    for name, path in places.items():
        if path is not None and re.match(r"[a-z0-9+]+:/", str(path)):
            raise UsageError(f"{name}={path} is a URL, and runs write to folders: name one that all ranks share")


def check_layout(config: Config, world_size: int) -> Layout:
    """Check ``config`` as ``check_config`` does, then against ``world_size`` ranks, and return the division.

    Raises UsageError with one sentence for the first mistake.
    """
    check_config(config)
    parallel, train = config.parallel, config.train
    if world_size < 1 or world_size % parallel.model_parallel:
        raise UsageError(
            f"a world size of {world_size} is not a multiple of parallel.tensor={parallel.tensor} x "
            f"parallel.pipeline={parallel.pipeline} x parallel.context={parallel.context} = "
            f"{parallel.model_parallel}: start {nearest_multiples(world_size, parallel.model_parallel)} ranks, "
            "or divide the model otherwise"
        )
    data = world_size // parallel.model_parallel
    return Layout(
        world_size=world_size,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        data=data,
        num_microbatches=_num_microbatches(train, parallel, data),
    )


def _check_schedule(train: Train, optimizer: Optimizer) -> None:
    warmup, decay = optimizer.warmup_steps, optimizer.decay_steps or train.steps
    ends = {"train.steps": train.steps, "optimizer.decay_steps": decay}
    for name, end in ends.items():
        if warmup >= end:
            raise UsageError(
                f"optimizer.warmup_steps={warmup} must be less than {name}={end}: use for example {end // 10}"
            )
    if optimizer.minimum_learning_rate > optimizer.learning_rate:
        raise UsageError(
            f"optimizer.minimum_learning_rate={optimizer.minimum_learning_rate:g} must not be above "
            f"optimizer.learning_rate={optimizer.learning_rate:g}"
        )
    if optimizer.wsd_decay_steps is not None and optimizer.wsd_decay_steps > decay:
        name = "train.steps" if optimizer.decay_steps is None else "optimizer.decay_steps"
        raise UsageError(
            f"optimizer.wsd_decay_steps={optimizer.wsd_decay_steps} must not be above {name}={decay}"
        )
    wsd = optimizer.wsd_decay(decay)
    if optimizer.schedule == "wsd" and warmup + wsd > decay:
        raise UsageError(
            f"optimizer.warmup_steps={warmup} and the final decay of {wsd} steps do not fit in {decay} steps: "
            f"use optimizer.wsd_decay_steps={decay - warmup} or less"
        )


def _num_microbatches(train: Train, parallel: Parallel, data: int) -> int:
    """Microbatches of a data-parallel rank in a step of the full batch, after a check of every batch of the run."""
    sizes = {f"train.batch_ramp.{n}.global_batch_size": s.global_batch_size for n, s in enumerate(train.batch_ramp)}
    for name, batch in {**sizes, "train.global_batch_size": train.global_batch_size}.items():
        _check_batch(name, batch, train, parallel, data)
    return train.global_batch_size // (train.micro_batch_size * data)


def _check_batch(name: str, batch: int, train: Train, parallel: Parallel, data: int) -> None:
    micro = train.micro_batch_size
    if batch % (micro * data):
        raise UsageError(
            f"{name}={batch} is not a multiple of train.micro_batch_size={micro} x {data} "
            f"data-parallel ranks = {micro * data}: use {nearest_multiples(batch, micro * data)}"
        )
    count, pipeline = batch // (micro * data), parallel.pipeline
    if parallel.virtual_pipeline > 1 and count % pipeline:
        raise UsageError(
            f"{name}={batch} makes {count} microbatches per rank, and "
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs a multiple of "
            f"parallel.pipeline={pipeline}: use {nearest_multiples(batch, micro * data * pipeline)}"
        )
