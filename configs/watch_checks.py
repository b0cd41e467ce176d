"""Whether what a run does about faults fits together."""

from __future__ import annotations

from .errors import UsageError
from .schema import Checkpoint, Watch


def check_watch(watch: Watch, checkpoint: Checkpoint) -> None:
    """Raise UsageError, in one sentence, unless hangs are found before torch gives up, and there is a way back."""
    if watch.hang_seconds >= watch.collective_timeout:
        raise UsageError(
            f"watch.hang_seconds={watch.hang_seconds:g} must be less than watch.collective_timeout="
            f"{watch.collective_timeout:g}, at which torch ends a rank without saying which one it waited for: use for "
            f"example {watch.collective_timeout / 2:g}, or 0 to turn the watch off"
        )
    for name in ("on_nonfinite", "on_spike"):
        if getattr(watch, name) == "roll_back" and checkpoint.interval == 0:
            raise UsageError(
                f"watch.{name}=roll_back goes back to the newest checkpoint, and checkpoint.interval=0 saves none "
                "before the end: save at an interval"
            )
