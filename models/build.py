"""Builds this rank's part of the model, and gives it its first parameters."""

from __future__ import annotations

from ..configs.schema import Config
from ..configs.stack import expand
from ..parallel.engine_config import engine_config
from ..parallel.parameters import initialise
from ..parallel.pipeline import stages_of
from ..parallel.topology import Topology
from .language_model import LanguageModel
from .site import Site


def build_chunks(config: Config, topology: Topology) -> list[LanguageModel]:
    """The pipeline chunks of this rank, with fp32 parameters drawn from ``train.seed``.

    The first parameters are the same whatever the layout. ``model.vocabulary_size`` must be known.
    """
    layout = topology.layout
    site = Site(config.model, engine_config(config, topology.device), topology.groups, topology.device)
    stages = stages_of(
        len(expand(config.model.stack)), layout.pipeline, layout.virtual_pipeline, topology.pipeline_rank
    )
    interleaved = layout.virtual_pipeline > 1
    chunks = [
        LanguageModel(site, stage, config.train.sequence_length, number if interleaved else None)
        for number, stage in enumerate(stages)
    ]
    if topology.device.type != "meta":
        for chunk in chunks:
            initialise(chunk, chunk.global_name, config.train.seed, topology.tensor_rank, layout.tensor)
    return chunks


def local_parameters(chunks: list[LanguageModel]) -> int:
    """Elements of parameters held by this rank."""
    return sum(p.numel() for chunk in chunks for p in chunk.parameters())
