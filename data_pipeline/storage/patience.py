"""Requests to a server: what may pass is tried again, and what does not is said in one sentence."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from ...configs.errors import RunError, UsageError

PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further attempt, on average."""

_Result = TypeVar("_Result")


class BadAnswer(Exception):
    """A server sent something else than it was asked for."""


def patiently(url: str, request: Callable[[], _Result]) -> _Result:
    """What ``request`` gives, at one of its attempts.

    FileNotFoundError, UsageError and RunError of it are raised as they are; a refusal (PermissionError), and the last
    of any other exceptions, as a RunError that names ``url``.
    """
    attempt = 0
    while True:
        try:
            return request()
        except (FileNotFoundError, UsageError, RunError):
            raise
        except PermissionError as error:
            raise RunError(f"{url} may not be read ({error}); check the credentials for it") from error
        except Exception as error:  # the clients have dozens of kinds without a common base
            if attempt == len(PAUSES):
                raise RunError(
                    f"{url} cannot be read ({str(error) or type(error).__name__}, {attempt + 1} attempts); "
                    "check the network and the server, then run again"
                ) from error
        # Thousands of ranks that lost the same server must not return to it at the same moment.
        time.sleep(PAUSES[attempt] * random.uniform(0.5, 1.5))
        attempt += 1
