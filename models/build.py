"""Builds this rank's part of the model, and gives it its first parameters."""

from __future__ import annotations

from ..configs.schema import Config
from ..configs.stack import context_order
from ..kernels.dispatch import check as check_backend
from ..parallel.context import ContextParallel, SequenceShare
from ..parallel.engine_config import engine_config
from ..parallel.fp8_checks import check_fp8_machine
from ..parallel.parameters import blueprint_of, initialise
from ..parallel.pipeline import stages_of
from ..parallel.topology import Topology
from .language_model import LanguageModel
from .site import Site
from .split import pipeline_split


def build_chunks(config: Config, topology: Topology) -> list[LanguageModel]:
    """The pipeline chunks of this rank, with fp32 parameters drawn from ``train.seed``.

    The first parameters are the same whatever the layout. ``model.vocabulary_size`` must be known. Raises UsageError
    where ``kernels.backend`` or ``precision.fp8`` needs another machine.
    """
    layout, groups = topology.layout, topology.groups
    check_backend(config.kernels.backend, topology.device)
    check_fp8_machine(config, topology.device)
    site = Site(
        config.model, engine_config(config, topology.device), groups, topology.device, config.train.recompute,
        fp8=config.precision.fp8, kernels=config.kernels.backend,
    )  # fmt: skip
    context = ContextParallel(share_of(config, topology), groups.cp, config.parallel.context_exchange)
    split = pipeline_split(config)
    stages = stages_of(split, layout.pipeline, topology.pipeline_rank)
    interleaved = layout.virtual_pipeline > 1
    chunks = [
        LanguageModel(site, split, stage, context, number if interleaved else None)
        for number, stage in enumerate(stages)
    ]
    if topology.device.type != "meta":
        for chunk in chunks:
            initialise(chunk, chunk.global_name, config.train.seed, topology.tensor_rank, layout.tensor)
    return chunks


def share_of(config: Config, topology: Topology) -> SequenceShare:
    """Which tokens of each sequence this rank holds."""
    size, rank = topology.layout.context, int(topology.groups.cp.rank())
    return SequenceShare(config.train.sequence_length, size, rank, context_order(config.model.stack))


def local_parameters(chunks: list[LanguageModel]) -> int:
    """Elements of parameters held by this rank."""
    return sum(
        sum(blueprint_of(parameter).local_elements(chunk.site.groups.tp.size()))
        for chunk in chunks
        for parameter in chunk.parameters()
    )
