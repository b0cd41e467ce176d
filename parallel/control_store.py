"""A line to the other ranks beside the process groups: it works while those wait for somebody, or are broken."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Mapping

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

_POLL_S = 0.25


def connect(environ: Mapping[str, str] = os.environ, seconds: float = 10.0) -> TCPStore | None:
    """A connection of its own to the store at which the ranks met; None where they met by other means.

    Raises DistError where the store does not answer within ``seconds``, which every later request may take, too.
    """
    host, port = environ.get("MASTER_ADDR"), int(environ.get("MASTER_PORT") or 0)
    if not host or not port:
        return None
    timeout = datetime.timedelta(seconds=seconds)
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def all_meet(store: TCPStore, place: str, world_size: int, seconds: float) -> bool:
    """Whether every rank comes to the same ``place`` within ``seconds``, and sees that the others did."""
    # One that has given up does not come to the second place, so that none goes on without it.
    return _all_come(store, place, world_size, seconds) and _all_come(store, f"{place}/sure", world_size, seconds)


def _all_come(store: TCPStore, place: str, world_size: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    try:
        store.add(place, 1)
        while store.add(place, 0) < world_size:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
    except (DistError, RuntimeError):  # whoever hosts the store is gone
        return False
    return True
