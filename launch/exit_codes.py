"""How a command ends badly: its exit code, and the one sentence on standard error."""

from __future__ import annotations

import sys
import traceback

from ..configs.errors import RunError, UsageError


def tell(error: BaseException) -> int:
    """Print what happened, and return the exit code: 2 wrong use, 130 interrupted, 1 anything else.

    Only an exception that nobody foresaw is printed with its traceback.
    """
    if isinstance(error, (UsageError, RunError)):
        print(f"trine: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UsageError) else 1
    if isinstance(error, KeyboardInterrupt):
        print("trine: interrupted", file=sys.stderr, flush=True)
        return 130
    traceback.print_exception(error)
    return 1
