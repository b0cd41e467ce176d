"""What a run tells the person who watches it: a banner, a progress bar, a summary."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from .metrics import StepMetrics

_LINES_PER_RUN = 40


class Console:
    """Progress on standard error: a bar on a terminal, else about forty lines in the whole run."""

    def __init__(self, steps: int, first_step: int, enabled: bool) -> None:
        self._enabled, self._steps = enabled, steps
        self._every = max(1, steps // _LINES_PER_RUN)
        self._terminal = enabled and sys.stderr.isatty()
        self._bar: Any = tqdm(
            total=steps, initial=first_step, unit="step", disable=not self._terminal, dynamic_ncols=True
        )

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._enabled:
            with tqdm.external_write_mode(file=sys.stderr):
                print(text, file=sys.stderr, flush=True)

    def step(self, metrics: StepMetrics) -> None:
        """Show a finished step."""
        self._bar.set_postfix_str(f"loss {metrics.loss:.3f}, {metrics.tokens_per_s:,.0f} tokens/s", refresh=False)
        self._bar.update()
        if self._terminal:
            return
        if metrics.step % self._every == 0 or metrics.step == self._steps:
            left = (self._steps - metrics.step) * metrics.step_time_s
            self.say(
                f"step {metrics.step}/{self._steps} | loss {metrics.loss:.4f} | grad norm {metrics.grad_norm:.3f} | "
                f"lr {metrics.lr:.2e} | {metrics.tokens_per_s:,.0f} tokens/s | {duration(left)} left"
            )

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def duration(seconds: float) -> str:
    """Human-readable time: ``42s``, ``3m10s``, ``5h02m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
