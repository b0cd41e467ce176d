"""The shards that a process holds open: few of them, whatever the number that it reads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..storage.folder import ByteSource
from .member_index import Member


class OpenShard(NamedTuple):
    """What reading a shard needs: about 64 KiB for 1,000 members, and one or two file descriptors."""

    source: ByteSource
    members: NDArray[np.int64]
    """(members, 7): the index, see ``member_index``."""
    ends: NDArray[np.int64]
    """(members,): the token of the shard at which each member ends, exclusive."""

    def member(self, number: int) -> Member:
        """Row ``number`` of the index."""
        return Member(*self.members[number].tolist())


class OpenShards:
    """At most ``limit`` open shards; the one that was used longest ago gives way. Safe for threads.

    A shard that gives way is closed when the last thread that reads it has finished.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = Lock()
        self._shards: OrderedDict[Hashable, OpenShard] = OrderedDict()

    def __len__(self) -> int:
        return len(self._shards)

    def get(self, key: Hashable) -> OpenShard | None:
        """The shard that was kept as ``key``, unless it gave way."""
        with self._lock:
            shard = self._shards.get(key)
            if shard is not None:
                self._shards.move_to_end(key)
            return shard

    def drop(self, key: Hashable) -> None:
        """Hold the shard that was kept as ``key`` no longer."""
        with self._lock:
            self._shards.pop(key, None)

    def keep(self, key: Hashable, shard: OpenShard) -> None:
        """Hold ``shard`` as ``key``."""
        with self._lock:
            self._shards[key] = shard
            while len(self._shards) > self.limit:
                self._shards.popitem(last=False)


OPEN_SHARDS = OpenShards(limit=128)
"""Of the whole process, as descriptors are: it may have as few as 1024, and a mixture has many datasets."""
