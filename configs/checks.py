"""Whether the numbers of a configuration fit together, and with the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import UsageError
from .remedies import divisors, listed, nearest_multiples
from .schema import Config, Model, Optimizer, Parallel, Train
from .stack import DifferentialCrossAttentionSegment, SharedKVSegment
from .stack_checks import check_stack, pairs_of


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
    _check_tensor(config.model, config.parallel)
    _check_sequence(config.train, config.parallel)
    _check_context(config.parallel)
    _check_pipeline(config.model, config.parallel)
    _check_schedule(config.train, config.optimizer)


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


def _tensor_units(model: Model) -> Iterator[tuple[str, int]]:
    """What tensor parallelism divides: how a sentence names it, and its count."""
    for index, segment in enumerate(model.stack):
        key = f"model.stack.{index}"
        if isinstance(segment, SharedKVSegment):
            yield _shared_units(model, index, segment)
        else:
            for name, count in segment.tensor_parallel_units().items():
                yield f"{key}.{name}={count}", count
    yield f"model.ffn_hidden_size={model.ffn_hidden_size}", model.ffn_hidden_size
    if model.vocabulary_size is not None:
        padded = model.padded_vocabulary()
        yield f"model.vocabulary_size={model.vocabulary_size} (padded to {padded})", padded


def _shared_units(model: Model, index: int, segment: SharedKVSegment) -> tuple[str, int]:
    kv_heads = segment.shared_kv.kv_heads
    name = f"model.stack.{index}.shared_kv.kv_heads={kv_heads}"
    for reader in model.stack[index + 1 :]:
        if isinstance(reader, SharedKVSegment):
            break
        if isinstance(reader, DifferentialCrossAttentionSegment):
            pairs = pairs_of(segment.shared_kv)
            return f"{name} ({pairs} pairs)", pairs
    return name, kv_heads


def _check_tensor(model: Model, parallel: Parallel) -> None:
    units = list(_tensor_units(model))
    for name, count in units:
        if count % parallel.tensor:
            fitting = divisors(math.gcd(*(count for _, count in units)))
            raise UsageError(
                f"{name} cannot be divided over parallel.tensor={parallel.tensor}: "
                f"the tensor sizes that fit this model are {listed(fitting)}"
            )


def _check_sequence(train: Train, parallel: Parallel) -> None:
    length, tensor = train.sequence_length, parallel.tensor
    if length < 2:
        raise UsageError(f"train.sequence_length={length} leaves no token to predict: use 2 or more")
    if not parallel.sequence:
        return
    if tensor == 1:
        raise UsageError(
            "parallel.sequence=true splits activations over the tensor ranks, and parallel.tensor=1 has only one: "
            "turn it off or raise parallel.tensor"
        )
    if length % tensor:
        raise UsageError(
            f"train.sequence_length={length} cannot be divided over parallel.tensor={tensor}, which "
            f"parallel.sequence=true needs: use {nearest_multiples(length, tensor)}"
        )


def _check_context(parallel: Parallel) -> None:
    if parallel.context > 1:
        raise UsageError(
            f"parallel.context={parallel.context} is not available in this version: use parallel.context=1"
        )


def _check_pipeline(model: Model, parallel: Parallel) -> None:
    pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline
    if virtual > 1 and pipeline == 1:
        raise UsageError(
            f"parallel.virtual_pipeline={virtual} interleaves pipeline stages, and parallel.pipeline=1 has only one: "
            "raise parallel.pipeline or use parallel.virtual_pipeline=1"
        )
    layers = sum(segment.layers for segment in model.stack if not isinstance(segment, SharedKVSegment))
    if layers % (pipeline * virtual):
        asked = f"parallel.pipeline={pipeline}"
        if virtual > 1:
            asked += f" x parallel.virtual_pipeline={virtual} = {pipeline * virtual}"
        raise UsageError(
            f"the {layers} layers of model.stack cannot be divided evenly over {asked}: "
            f"the numbers that divide them are {listed(divisors(layers))}"
        )


def _check_schedule(train: Train, optimizer: Optimizer) -> None:
    warmup, decay = optimizer.warmup_steps, optimizer.decay_steps or train.steps
    ends = {"train.steps": train.steps, "optimizer.decay_steps": decay}
    for name, end in ends.items():
        if warmup >= end:
            raise UsageError(f"optimizer.warmup_steps={warmup} must be less than {name}={end}")
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
    batch, micro = train.global_batch_size, train.micro_batch_size
    if batch % (micro * data):
        raise UsageError(
            f"train.global_batch_size={batch} is not a multiple of train.micro_batch_size={micro} x {data} "
            f"data-parallel ranks = {micro * data}: use {nearest_multiples(batch, micro * data)}"
        )
    count, pipeline = batch // (micro * data), parallel.pipeline
    if parallel.virtual_pipeline > 1 and count % pipeline:
        raise UsageError(
            f"train.global_batch_size={batch} makes {count} microbatches per rank, and "
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs a multiple of "
            f"parallel.pipeline={pipeline}: use {nearest_multiples(batch, micro * data * pipeline)}"
        )
    return count
