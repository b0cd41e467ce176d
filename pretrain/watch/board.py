"""Where ranks tell each other what they do while their process groups may hang: the run's store."""

from __future__ import annotations

import datetime
import json
import queue
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .verdict import Record

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

T = TypeVar("T")

_CONNECT_S = 5.0
_RETRY_S = 0.2


class StoreSilentError(Exception):
    """The store has not answered in time."""


@dataclass(frozen=True)
class Verdict:
    """What one rank has found and all of them tell."""

    line: str
    speaker: int
    """The rank that tells it on the console."""
    answering: int
    """How many ranks are there to tell it in their logs."""


class Board:
    """This rank's own connection to the run's store, used by one thread of its own.

    A call to a store whose process is stopped never returns, whatever its timeout. So whoever asks waits for that
    thread no longer than ``patience`` seconds, and then sees a StoreSilentError. The thread is given up with its call.
    """

    def __init__(self, address: tuple[str, int], rank: int, world_size: int, attempt: str, patience: float) -> None:
        self._address, self._rank, self._world_size, self._patience = address, rank, world_size, patience
        self._prefix = f"trine/watch/{attempt}/"
        self._store: TCPStore | None = None
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._published: Future[None] | None = None
        self.verdict: Verdict | None = None
        """The run's verdict, as of the last publication; there is one at most."""
        self._thread = threading.Thread(target=self._work, name="trine-watch-store", daemon=True)
        self._thread.start()

    @property
    def place(self) -> str:
        """Where the store is, as HOST:PORT."""
        return "{}:{}".format(*self._address)

    def publish(self, record: Record, *, wait: bool = False) -> None:
        """Tell the others ``record`` and look for a verdict; without ``wait`` both are done some time later."""
        if self._published is None or self._published.done():
            self._published = self._submit(lambda store: self._exchange(store, record))
        if wait:
            futures.wait([self._published], self._patience)

    def read(self) -> dict[int, Record]:
        """The newest record of every rank that has told one."""
        return self._ask(self._records)

    def claim(self) -> bool:
        """Whether this rank is to judge: the first one that asks is, and of thousands one is enough."""
        return self._ask(lambda store: store.add(self._prefix + "judges", 1)) == 1

    def give_up_claim(self) -> None:
        """Let another rank judge."""
        self._ask(lambda store: store.delete_key(self._prefix + "judges"))

    def propose(self, verdict: Verdict) -> Verdict:
        """Make ``verdict`` the run's, unless it has one; returns the run's."""
        text = json.dumps(asdict(verdict))
        return _verdict(self._ask(lambda store: store.compare_set(self._prefix + "verdict", "", text)))

    def acknowledge(self) -> None:
        """Say that this rank has told the verdict."""
        self._ask(lambda store: store.add(self._prefix + "told", 1))

    def acknowledged(self) -> int:
        """How many ranks have told the verdict."""
        return self._ask(lambda store: store.add(self._prefix + "told", 0))

    def close(self, last: Record, seconds: float) -> None:
        """Tell ``last`` and end the thread, or give both up after ``seconds``."""
        self._submit(lambda store: store.set(self._key(self._rank), last.encode()))
        self._jobs.put(None)
        self._thread.join(seconds)

    def _ask(self, question: Callable[[TCPStore], T]) -> T:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                return self._submit(question).result(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise StoreSilentError from None
            except Exception as error:  # most likely a lost connection; the next question makes another
                if time.monotonic() + _RETRY_S > deadline:
                    raise StoreSilentError from error
                time.sleep(_RETRY_S)

    def _submit(self, question: Callable[[TCPStore], T]) -> Future[T]:
        future: Future[T] = Future()

        def job() -> None:
            try:
                future.set_result(question(self._connected()))
            except Exception as error:
                self._store = None
                future.set_exception(error)

        self._jobs.put(job)
        return future

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _connected(self) -> TCPStore:
        if self._store is None:
            import torch.distributed as dist

            host, port = self._address
            timeout = datetime.timedelta(seconds=min(_CONNECT_S, self._patience))
            self._store = dist.TCPStore(  # type: ignore[attr-defined]
                host, port, is_master=False, timeout=timeout, wait_for_workers=False
            )
        return self._store

    def _exchange(self, store: TCPStore, record: Record) -> None:
        store.set(self._key(self._rank), record.encode())
        if store.check([self._prefix + "verdict"]):
            self.verdict = _verdict(store.get(self._prefix + "verdict"))

    def _records(self, store: TCPStore) -> dict[int, Record]:
        ranks = list(range(self._world_size))
        if not store.check([self._key(rank) for rank in ranks]):
            ranks = [rank for rank in ranks if store.check([self._key(rank)])]
        values = store.multi_get([self._key(rank) for rank in ranks]) if ranks else []
        return {rank: Record.decode(value) for rank, value in zip(ranks, values, strict=True)}

    def _key(self, rank: int) -> str:
        return f"{self._prefix}{rank}"


def _verdict(data: Any) -> Verdict:
    return Verdict(**json.loads(data))
