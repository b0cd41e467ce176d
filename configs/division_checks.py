"""Whether a model can be divided: its heads and widths over tensor ranks, its layers over pipeline chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .errors import UsageError
from .remedies import divisors, even_parts, listed
from .schema import Model, Parallel
from .stack import DifferentialCrossAttentionSegment, Segment, SharedKVSegment
from .stack_checks import pairs_of


def check_tensor(model: Model, parallel: Parallel) -> None:
    """Raise UsageError, in one sentence, for the first thing that ``parallel.tensor`` must divide and does not."""
    units = list(_tensor_units(model))
    for name, count in units:
        if count % parallel.tensor:
            fitting = divisors(math.gcd(*(count for _, count in units)))
            raise UsageError(
                f"{name} cannot be divided over parallel.tensor={parallel.tensor}: "
                f"the tensor sizes that fit this model are {listed(fitting)}"
            )


def check_pipeline(stack: tuple[Segment, ...], parallel: Parallel) -> None:
    """Raise UsageError, in one sentence, unless ``parallel.pipeline_split`` gives every chunk at least one layer."""
    pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline
    if virtual > 1 and pipeline == 1:
        raise UsageError(
            f"parallel.virtual_pipeline={virtual} interleaves pipeline stages, and parallel.pipeline=1 has only one: "
            "raise parallel.pipeline or use parallel.virtual_pipeline=1"
        )
    layers = sum(segment.layers for segment in stack if not isinstance(segment, SharedKVSegment))
    if layers < pipeline * virtual:
        raise UsageError(
            f"the {layers} layers of model.stack are fewer than the chunks of {_chunks(parallel)}, each of which "
            f"holds at least one: use {layers} chunks or fewer"
        )
    if parallel.pipeline_split == "even":
        _check_even_split(layers, parallel)
    elif parallel.pipeline_split != "balanced":
        _check_listed_split(parallel.pipeline_split, layers, parallel)


def _chunks(parallel: Parallel) -> str:
    """How a sentence names the number of chunks of the pipeline."""
    pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline
    if virtual == 1:
        return f"parallel.pipeline={pipeline}"
    return f"parallel.pipeline={pipeline} x parallel.virtual_pipeline={virtual} = {pipeline * virtual}"


def _check_even_split(layers: int, parallel: Parallel) -> None:
    if layers % (parallel.pipeline * parallel.virtual_pipeline):
        raise UsageError(
            f"the {layers} layers of model.stack cannot be divided over {_chunks(parallel)} with "
            "parallel.pipeline_split=even: use parallel.pipeline_split=balanced, or one of the numbers that divide "
            f"them: {listed(divisors(layers))}"
        )


def _check_listed_split(split: tuple[int, ...], layers: int, parallel: Parallel) -> None:
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if len(split) != chunks or sum(split) != layers:
        raise UsageError(
            f"parallel.pipeline_split={list(split)} puts {sum(split)} layers into {len(split)} chunks, and model.stack "
            f"has {layers} layers for the {chunks} chunks of {_chunks(parallel)}: use for example "
            f"{even_parts(layers, chunks)}, or balanced"
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
            return f"{name} ({pairs} pair{'s' if pairs > 1 else ''})", pairs
    return name, kv_heads
