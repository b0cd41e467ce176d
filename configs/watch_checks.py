"""Whether what a run does about faults fits together."""

from __future__ import annotations

from .errors import UsageError
from .schema import Checkpoint, Watch

JUDGING_S = 40.0
"""What it may take from the moment when a rank has stood still for its limit until it has been named."""


def check_watch(watch: Watch, checkpoint: Checkpoint) -> None:
    """Raise UsageError, in one sentence, unless hangs are found before torch gives up, and there is a way back."""
    if watch.hang_seconds > 0 and watch.hang_seconds + JUDGING_S > watch.collective_timeout:
        fits = max(1.0, watch.collective_timeout / 2 - JUDGING_S)
        raise UsageError(
            f"watch.hang_seconds={watch.hang_seconds:g} must be at least {JUDGING_S:g} less than "
            f"watch.collective_timeout={watch.collective_timeout:g}, at which torch ends a rank without saying which "
            f"one it waited for: use for example watch.hang_seconds={fits:g}, or 0 to turn the watch off"
        )
    for name in ("on_nonfinite", "on_spike"):
        if getattr(watch, name) == "roll_back" and checkpoint.interval == 0:
            raise UsageError(
                f"watch.{name}=roll_back goes back to the newest checkpoint, and checkpoint.interval=0 saves none "
                "before the end: save at an interval"
            )
