"""What becomes of a step whose loss or gradient norm is not as it should be."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from ...configs.schema import Watch

Action = Literal["accept", "skip", "roll_back", "stop"]


@dataclass(frozen=True)
class Judgement:
    """What to do with a step, and why."""

    action: Action
    reason: str | None = None
    """None for a step with which all is well."""


class Judge:
    """Judges steps by numbers that are equal on every rank, so that the ranks need not agree on anything.

    Both numbers are on the host already: Megatron-Core's gradient norm is a number there before the update begins. So
    a step is judged, and skipped, without another synchronisation.

    A spike is a value above mean + ``spike_deviations`` x deviation of the last ``spike_window`` updates, for the loss
    or for the gradient norm (the rule of OLMo-core's skip-step optimizers).
    """

    def __init__(self, settings: Watch) -> None:
        self._settings = settings
        self._losses: deque[float] = deque(maxlen=settings.spike_window)
        self._norms: deque[float] = deque(maxlen=settings.spike_window)
        self._skipped_in_row = 0
        self.skipped = 0
        """Steps that changed no parameter."""
        self.spikes = 0
        self.roll_backs = 0

    def judge(self, loss: float, grad_norm: float) -> Judgement:
        """What to do with the next step. The judge takes it that this is then done."""
        reason = self._reason(loss, grad_norm)
        action = self._action(loss, grad_norm, reason)
        if action == "accept":
            self._losses.append(loss)
            self._norms.append(grad_norm)
            self._skipped_in_row = 0
        elif action == "skip":
            self.skipped += 1
            self._skipped_in_row += 1
            if self._skipped_in_row >= self._settings.skip_budget:
                count = self._skipped_in_row
                return Judgement("stop", f"{reason}, and {count} steps in a row were passed over (watch.skip_budget)")
        elif action == "roll_back":
            return self._rolled_back(reason)
        return Judgement(action, reason)

    def counters(self) -> dict[str, float]:
        """For TensorBoard."""
        return {
            "resilience/skipped_steps": float(self.skipped),
            "resilience/spikes": float(self.spikes),
            "resilience/roll_backs": float(self.roll_backs),
        }

    def state(self) -> dict[str, Any]:
        """For a checkpoint: JSON."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "skipped_in_row": self._skipped_in_row,
            "skipped": self.skipped,
            "spikes": self.spikes,
            "roll_backs": self.roll_backs,
        }

    def restore(self, state: dict[str, Any], *, counts: bool = True) -> None:
        """Go on from a checkpoint; without ``counts`` a run that has gone back keeps what it has counted since."""
        self._losses.clear()
        self._losses.extend(state["losses"])
        self._norms.clear()
        self._norms.extend(state["norms"])
        self._skipped_in_row = 0
        if counts:
            self._skipped_in_row = int(state["skipped_in_row"])
            self.skipped, self.spikes = int(state["skipped"]), int(state["spikes"])
            self.roll_backs = int(state["roll_backs"])

    def _reason(self, loss: float, grad_norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss {loss:g} and gradient norm {grad_norm:g} are not finite"
        for name, value, recent in (("loss", loss, self._losses), ("gradient norm", grad_norm, self._norms)):
            limit = self._limit(recent)
            if value > limit:
                return f"{name} {value:.4g} is above {limit:.4g}, as the last {len(recent)} steps have it"
        return None

    def _limit(self, recent: deque[float]) -> float:
        if len(recent) < self._settings.spike_window:
            return math.inf
        mean = statistics.fmean(recent)
        return mean + self._settings.spike_deviations * statistics.pstdev(recent, mean)

    def _action(self, loss: float, grad_norm: float, reason: str | None) -> Action:
        if reason is None:
            return "accept"
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.spikes += 1
            return self._settings.on_spike
        return self._settings.on_nonfinite

    def _rolled_back(self, reason: str | None) -> Judgement:
        if self.roll_backs >= self._settings.roll_back_budget:
            return Judgement("stop", f"{reason}; the run went back {self.roll_backs} times (watch.roll_back_budget)")
        self.roll_backs += 1
        return Judgement("roll_back", reason)
