"""Which classes a layer takes for its linear maps: the one place that knows them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from ..configs.schema import Fp8
from .fp8_linear import Fp8Choice, Fp8ColumnLinear, Fp8RowLinear
from .linear import ColumnLinear, RowLinear
from .parameters import Law, Section


@dataclass(frozen=True)
class Linears:
    """The two kinds of a layer's linear maps."""

    column: Callable[[int, Sequence[Section], TransformerConfig, ProcessGroupCollection], nn.Module]
    """Makes a map whose rows are divided over tensor ranks, with the contract of ``ColumnLinear``."""
    row: Callable[[int, int, Law, TransformerConfig, ProcessGroupCollection], nn.Module]
    """Makes a map whose columns are divided over tensor ranks, with the contract of ``RowLinear``."""


def linears_of(fp8: Fp8 | None, layer: int, layers: int) -> Linears:
    """The linear maps of layer ``layer``, counted from 0 in the whole model of ``layers``."""
    if fp8 is None or not fp8.covers(layer, layers):
        return Linears(ColumnLinear, RowLinear)
    if fp8.backend == "te":
        from .te_linear import TEColumnLinear, TERowLinear

        return Linears(TEColumnLinear, TERowLinear)
    choice = Fp8Choice(fp8.backend, fp8.recipe)
    return Linears(partial(Fp8ColumnLinear, choice=choice), partial(Fp8RowLinear, choice=choice))


def linears_context(fp8: Fp8 | None, config: TransformerConfig) -> AbstractContextManager[Any]:
    """What the maps of a stage's layers must be called in: Transformer Engine's need one, ours none."""
    if fp8 is None or fp8.backend != "te":
        return nullcontext()
    from .te_linear import fp8_context

    return fp8_context(config)
