"""The same training steps under any layout: what a rank computes of them that must not depend on the layout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..configs.checks import check_layout
from ..configs.layouts import NamedLayout
from ..configs.schema import Config, Optimizer, Precision
from ..models.build import build_chunks
from ..parallel.engine import Engine
from ..parallel.engines import make_engine
from ..parallel.microbatch import Microbatch
from ..parallel.topology import build_topology, local_device
from .parity_pieces import Piece, pieces_of

DEFAULT_VOCABULARY = 1000
"""Token ids where the configuration leaves them to the data, which are not read."""

ADAM_EPS = 1e-5
"""AdamW moves every element by about the learning rate, whatever its gradient: with the usual 1e-8 an element whose
gradient is rounding error alone takes a full step in a random direction. This eps holds such elements still, so that
later steps can be compared as closely as the first."""

MICRO_BATCH = 2
"""Sequences of a microbatch at most."""

DOCUMENTS = 4
"""Documents in each window, where they are kept apart."""

OPTIMIZER = Optimizer(learning_rate=1e-4, schedule="constant", eps=ADAM_EPS)
"""Steps small enough that a model far from its minimum does not magnify rounding from one to the next."""


class StepsOfRank(TypedDict):
    """What one rank computed. Numbers are equal on every rank; tensors are this rank's pieces."""

    losses: list[float]
    grad_norms: list[float]
    learning_rates: list[float]
    evaluation: float
    """Loss after the last step on the samples of step 0."""
    gradients: list[Piece]
    """Of the first step, reduced and not clipped."""
    parameters: list[Piece]
    """After the last step."""


def parity_config(config: Config, layouts: Sequence[NamedLayout], steps: int) -> Config:
    """``config`` as parity trains it: in fp32, with ``OPTIMIZER`` and a small batch that every layout can divide.

    Microbatches have ``MICRO_BATCH`` sequences at most: enough for two that differ, and what memory takes first.
    The batch is the smallest that gives each data rank of every layout whole microbatches, two or more of them (so
    that gradients are summed over microbatches), and a multiple of the pipeline's size where stages interleave.
    """
    micro = min(config.train.micro_batch_size, MICRO_BATCH)
    vocabulary = config.model.vocabulary_size or DEFAULT_VOCABULARY
    batch = math.lcm(*(micro * layout.data * _microbatch_unit(layout) for layout in layouts))
    if any(batch == micro * layout.data for layout in layouts):
        batch *= 2
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"vocabulary_size": vocabulary}),
            "train": config.train.model_copy(
                update={"steps": steps, "global_batch_size": batch, "micro_batch_size": micro}
            ),
            "optimizer": OPTIMIZER,
            "precision": Precision(compute="fp32"),
        }
    )


def train(rank: int, world_size: int, *, config: dict[str, Any], steps: int) -> StepsOfRank:
    """One rank's part in ``steps`` steps from the first parameters, as a job of a pool of ranks.

    ``config`` is a dumped ``Config`` of a known vocabulary; the process group must have been joined.
    """
    with joined_engine(rank, world_size, Config.model_validate(config)) as engine:
        return take_steps(engine, steps)


@contextmanager
def joined_engine(rank: int, world_size: int, config: Config) -> Iterator[Engine]:
    """The engine of one rank under the layout of ``config``, which lets go of its groups at the end.

    Raises UsageError where the layout does not fit the ranks.
    """
    topology = build_topology(check_layout(config, world_size), local_device(rank))
    engine = make_engine(build_chunks(config, topology), config, topology)
    try:
        yield engine
    finally:
        engine.close()


def take_steps(engine: Engine, steps: int, first_step: int = 0) -> StepsOfRank:
    """Train steps ``first_step`` .. ``first_step + steps - 1`` on synthetic tokens and say everything about them."""
    engine.compute_gradients(batch_of_step(engine, first_step))
    gradients = pieces_of(engine, engine.gradient_of)
    results = [engine.train_step(batch_of_step(engine, first_step + step)) for step in range(steps)]
    return {
        "losses": [result.loss for result in results],
        "grad_norms": [result.grad_norm for result in results],
        "learning_rates": [result.learning_rate for result in results],
        "evaluation": engine.evaluate(batch_of_step(engine, 0), engine.topology.layout.num_microbatches),
        "gradients": gradients,
        "parameters": pieces_of(engine, engine.weight_of),
    }


def batch_of_step(engine: Engine, step: int) -> Iterator[Microbatch]:
    """This rank's microbatches: of a global batch that the step alone decides, its data rank's share.

    Tokens are uniform over the vocabulary. Under ``train.document_masking`` each sample has ``DOCUMENTS`` documents
    that begin at random places of its own.
    """
    config, topology = engine.config, engine.topology
    train, vocabulary = config.train, config.model.vocabulary_size or DEFAULT_VOCABULARY
    generator = torch.Generator().manual_seed(step)
    shape = (train.global_batch_size, train.sequence_length + 1)
    windows = torch.randint(0, vocabulary, shape, generator=generator)
    starts = _document_starts(windows[:, :-1], generator)
    for window, start in zip(_microbatches(windows, engine), _microbatches(starts, engine), strict=True):
        window = window.to(topology.device)
        documents = start.to(topology.device) if train.document_masking else None
        yield Microbatch(window[:, :-1], window[:, 1:], documents)


def _microbatches(samples: Tensor, engine: Engine) -> tuple[Tensor, ...]:
    topology = engine.topology
    mine = samples.chunk(topology.layout.data)[topology.data_rank]
    return torch.split(mine, engine.config.train.micro_batch_size)


def _document_starts(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """(B, S) int64: where each token's document starts, the first of them before the window."""
    positions = torch.rand(tokens.shape, generator=generator).argsort(dim=1)[:, : DOCUMENTS - 1]
    starts = torch.zeros_like(tokens).scatter(1, positions, positions)
    return starts.cummax(dim=1).values


def _microbatch_unit(layout: NamedLayout) -> int:
    """What the number of a data rank's microbatches must be a multiple of."""
    interleaved = layout.parallel.get("virtual_pipeline", 1) > 1
    return int(layout.parallel.get("pipeline", 1)) if interleaved else 1
