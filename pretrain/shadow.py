"""What FP8 does to the loss: a look, now and then, at the same microbatches without it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..configs.ramps import StepShape
from ..configs.schema import Fp8
from ..parallel.engine import Engine
from ..parallel.microbatch import Microbatch


class ShadowCheck:
    """Compares a step's loss with that of its microbatches in the compute type, before the step changes parameters."""

    def __init__(self, fp8: Fp8 | None, engine: Engine) -> None:
        self._fp8, self._engine = fp8, engine
        self._values: dict[str, float] = {}

    def see(self, step: int, microbatches: Sequence[Microbatch], shape: StepShape, loss: float) -> None:
        """Compare at the interval ``loss``, which step ``step`` gave of its ``microbatches`` before its update.

        Every rank must call it; at the interval it costs a forward pass.
        """
        self._values = {}
        if self._fp8 is None or self._fp8.shadow_interval == 0 or step % self._fp8.shadow_interval:
            return
        if not math.isfinite(loss):
            return
        shadow = self._engine.loss_without_fp8(iter(microbatches), shape)
        # A name of its own for emulated numbers, so that no curve of them is taken for hardware's.
        family = "fp8-emulated" if self._fp8.backend == "emulate" else "fp8"
        self._values = {f"{family}/loss_gap": (loss - shadow) / shadow, f"{family}/loss_without": shadow}

    def values(self) -> dict[str, float]:
        """What the last step's comparison gave: the gap relative to the loss without FP8; nothing between them."""
        return self._values
