"""The 8-bit products of a rank's model together: switched off and on, kept up with the weights, saved."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megatron.core import parallel_state

from ..configs.schema import Config
from .agreement import union_over_ranks
from .fp8_history import Histories, History
from .fp8_linear import Fp8ColumnLinear, Fp8Product, Fp8RowLinear
from .topology import Topology

logger = logging.getLogger(__name__)


class Fp8Control:
    """What the engine tells its 8-bit products. Does nothing where there are none."""

    def __init__(self, chunks: list[Any], config: Config, topology: Topology) -> None:
        self._topology, self._engine_config = topology, chunks[0].config
        self._products: dict[str, Fp8Product] = {
            chunk.global_name(f"{name}.weight").removesuffix(".weight"): module.fp8
            for chunk in chunks
            for name, module in chunk.named_modules()
            if isinstance(module, (Fp8ColumnLinear, Fp8RowLinear))
        }
        fp8 = config.precision.fp8
        self._histories: Histories | None = None
        if fp8 is not None and fp8.recipe == "delayed" and fp8.backend != "te":
            self._histories = Histories(len(self._products), topology.device)
            for index, product in enumerate(self._products.values()):
                product.attach(self._histories, index)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it every product is that of the compute type."""
        engine_choice, self._engine_config.fp8 = self._engine_config.fp8, None
        for product in self._products.values():
            product.on = False
        try:
            yield
        finally:
            self._engine_config.fp8 = engine_choice
            for product in self._products.values():
                product.on = True

    def begin_pass(self) -> None:
        """Expect other weights than those of the last pass over microbatches."""
        for product in self._products.values():
            product.forget_weight()

    def begin_step(self, tokens: int) -> None:
        """Begin to note the magnitudes of a step of so many tokens over all ranks."""
        if self._histories is not None:
            # A loss is the mean over a context rank's own tokens of a microbatch, and a step that of its microbatches:
            # together the mean over these ranks' tokens of the step.
            layout = self._topology.layout
            self._histories.begin_step(layout.context * layout.data / tokens)

    def end_step(self) -> None:
        """The step counts: its magnitudes go into the histories, in one collective. Every rank must call it."""
        if self._histories is not None:
            # All ranks that hold these layers: those of one pipeline stage.
            self._histories.end_step(parallel_state.get_amax_reduction_group(with_context_parallel=True))

    def state(self) -> dict[str, History] | None:
        """The histories of the whole model by global name, for a checkpoint; None without. Every rank must call it."""
        if self._histories is None:
            return None
        own = {name: self._histories.state(index) for index, name in enumerate(self._products)}
        return union_over_ranks({name: past for name, past in own.items() if past is not None}, self._topology)

    def restore(self, state: Mapping[str, History] | None) -> None:
        """Go on from ``state`` of a run that may have had other products, or none."""
        if self._histories is None:
            if state:
                logger.info("the checkpoint's histories of delayed scaling are left out: this run does not use them")
            return
        past = state or {}
        for index, name in enumerate(self._products):
            self._histories.restore(index, past.get(name))
        missing = [name for name in self._products if name not in past]
        if missing:
            logger.warning(
                "delayed scaling begins anew for %d of %d linear maps, of which the checkpoint has no history: the "
                "first step takes the scales of its own tensors", len(missing), len(self._products),
            )  # fmt: skip
