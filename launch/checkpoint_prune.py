"""``trine checkpoint prune``: what can go of a folder of checkpoints, and its removal while no run is in the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..configs.errors import RunError, UsageError
from ..pretrain.checkpoints import folder
from ..pretrain.checkpoints.inventory import Entry, entries, file_sizes
from .checkpoint_places import Place, runs_of
from .checkpoint_text import count, say, size
from .checkpoint_verify import verify

if TYPE_CHECKING:
    from ..pretrain.run_lock import RunLock


@dataclass(frozen=True)
class Wish:
    """What is to stay of complete checkpoints, and what else is to go."""

    keep: int
    keep_every: int
    """0 keeps none for good."""
    unfinished: bool
    damaged: bool


def prune(place: Place, wish: Wish, *, workers: int, yes: bool) -> int:
    """Say what can go, or under ``yes`` remove it; without ``workers`` the newest is not verified. Returns 0.

    Raises:
        UsageError: a run holds the folder.
        RunError: no complete checkpoint would remain, the newest is damaged, or something cannot be removed.
    """
    if not yes:
        _announce(place, _superfluous(place.root, wish), verified=workers > 0)
        return 0
    with _held(place) as locks:
        # Looked at only now: until it is locked a run may change what is there.
        going = _superfluous(place.root, wish)
        if going and workers:
            _check_newest(place.root, workers)
        freed = 0
        for entry in going:
            for lock in locks:
                lock.check()
            freed += _remove(entry)
    say([f"removed {count(len(going), 'checkpoint')}, {size(freed)}" if going else _nothing(place)])
    return 0


def _superfluous(root: Path, wish: Wish) -> list[Entry]:
    if not root.exists():
        return []
    found = entries(root)
    if found and folder.newest(root) is None:
        raise RunError(
            f"{root} holds no complete checkpoint, so nothing is removed, for what there is may be all that is left of "
            "a run: repair one, or remove the folder by hand"
        )
    old = set(folder.superseded(root, wish.keep, wish.keep_every))
    going = {"complete": True, "unfinished": wish.unfinished, "damaged": wish.damaged}
    return [
        entry for entry in found
        if going[entry.state] and (entry.state != "complete" or entry.path in old) and not entry.path.is_symlink()
    ]  # fmt: skip


def _announce(place: Place, going: list[Entry], *, verified: bool) -> None:
    sizes = [_bytes(entry) for entry in going]
    say(f"would remove {entry.path.name}, {size(number)}" for entry, number in zip(going, sizes, strict=True))
    if going:
        newest = folder.newest(place.root)
        stays = f"; {newest.name} stays{' and is verified before' if verified else ''}" if newest else ""
        say([f"{count(len(going), 'checkpoint')}, {size(sum(sizes))}: --yes removes them{stays}", *_in_use(place)])
    else:
        say([_nothing(place)])


def _nothing(place: Place) -> str:
    return f"{place.run or place.root}: nothing to remove"


def _bytes(entry: Entry) -> int:
    return sum(file_sizes(entry.path).values())


def _check_newest(root: Path, workers: int) -> None:
    newest = folder.newest(root)
    if newest is None:
        return
    found = verify(newest, workers).sentences
    if found:
        raise RunError(
            f"{newest.name}, the newest, is damaged ({found[0]}), so nothing is removed: restore "
            f"it from a copy or rename it to {newest.name}{folder.DAMAGED}"
        )


def _remove(entry: Entry) -> int:
    number = _bytes(entry)
    try:
        folder.remove(entry.path)
    except OSError as error:
        raise RunError(f"{entry.path} cannot be removed ({error.strerror}): remove it as its owner") from error
    say([f"removed {entry.path.name}, {size(number)}"])
    return number


@contextmanager
def _held(place: Place) -> Iterator[list[RunLock]]:
    """Within it no run begins in the folders of the runs that may write here. Raises UsageError where one lives."""
    from ..pretrain.run_lock import RunLock

    with ExitStack() as stack:
        try:
            locks = [stack.enter_context(RunLock.acquire(run)) for run in runs_of(place)]
        except UsageError as error:
            raise UsageError(
                f"nothing is removed where a run may write, which prunes by itself (checkpoint.keep): {error}"
            ) from error
        yield locks


def _in_use(place: Place) -> list[str]:
    """A line for each run that may live; only ``--yes`` waits for a sign of life."""
    from ..pretrain.lock_holder import is_gone, parse
    from ..pretrain.run_lock import LOCK

    told = []
    for run in runs_of(place):
        try:
            holder = parse((run / LOCK).read_bytes())
        except FileNotFoundError:
            continue
        if holder is not None and not is_gone(holder):
            told.append(f"{run} is locked by {holder}: --yes removes nothing while that lives")
    return told
