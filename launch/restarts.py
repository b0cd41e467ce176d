"""``trine launch local``: the ranks of this machine are started again after a failure, while that gets anywhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from ..configs.errors import UsageError

_FAILED = 1


def keep_running(start: Callable[[], int], newest: Callable[[], Path | None], max_restarts: int) -> int:
    """Call ``start`` again while it returns 1, up to ``max_restarts`` times in a row without a new checkpoint.

    ``newest`` finds the newest checkpoint. Returns what the last call did. Raises UsageError for a negative number,
    and what ``start`` raises.
    """
    if max_restarts < 0:
        raise UsageError(f"--max-restarts {max_restarts} is less than none: use 0 or more")
    failures, before = 0, newest()
    while (code := start()) == _FAILED:
        after = newest()
        failures, before = (failures + 1 if after == before else 1), after
        if failures > max_restarts:
            return code
        place = f"checkpoint {after}" if after else "the first step: there is no checkpoint yet"
        print(f"trine: restart {failures} of {max_restarts} from {place}", file=sys.stderr, flush=True)
    return code
