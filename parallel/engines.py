"""Which engine trains a run: the one place that knows them all."""

from __future__ import annotations

from typing import Any

from ..configs.schema import Config
from .engine import Engine
from .megatron_engine import MegatronEngine
from .topology import Topology


def make_engine(chunks: list[Any], config: Config, topology: Topology) -> Engine:
    """The engine that ``config.engine`` names, around this rank's ``chunks``. Every rank must call it."""
    if config.engine == "deepspeed":
        from .deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(chunks, config, topology)
    return MegatronEngine(chunks, config, topology)
