"""One run at a time in a run directory, on whatever hosts: ``run.lock`` there, whose holder is seen to live.

The holder counts up a beat in the file. Whoever wants the directory takes the lock over when the beat stands still
while it looks on; no clock and no time of a file is compared. Three rules keep this safe where processes are stopped
at any point and go on much later:

- The lock gets its name only where nothing has that name, and loses it by being renamed, which succeeds once: so
  one of many takes over.
- A holder writes to the file that it made and not to the name, which may lead to another's by then.
- A holder asks before it changes what other runs read: ``check`` is the fence.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shlex
import threading
import time
from collections.abc import Callable
from io import BufferedRandom
from pathlib import Path
from typing import NoReturn

from ..configs.errors import RunError, UsageError
from ..data_pipeline.durable import TEMPORARY_SUFFIX, discard, open_temporary
from .lock_holder import Holder, encode, has_token, is_gone, parse, this_process

logger = logging.getLogger(__name__)

LOCK = "run.lock"

_BEAT_S = 5.0
_WATCHED_BEATS = 3
_LOOKS_PER_BEAT = 5
_READS, _READ_AGAIN_S = 5, 0.2
_CLOSE_S = 2.0
_SOMETHING = "a process that wrote no readable lock"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# FAT, and some file systems in user space.
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class HeldLocks:
    """All that a run holds: its directory, and that of its checkpoints where that is elsewhere."""

    def __init__(self, *locks: RunLock) -> None:
        self._locks = locks

    @property
    def lost(self) -> bool:
        """Whether another run was seen to have taken one over; costs nothing to ask."""
        return any(lock.lost for lock in self._locks)

    def check(self) -> None:
        """Raise RunError unless this process still holds all of them."""
        for lock in self._locks:
            lock.check()


class RunLock:
    """A run directory that this process holds."""

    def __init__(self, path: Path, holder: Holder, file: BufferedRandom, beat_seconds: float) -> None:
        self._path, self._holder, self._file, self._beat_seconds = path, holder, file, beat_seconds
        self._beat = 0
        self._released = threading.Event()
        self.lost = False
        """Whether another run was seen to have taken over; costs nothing to ask."""
        self._thread = threading.Thread(target=self._keep_beating, name="trine-run-lock", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, directory: Path, *, beat_seconds: float = _BEAT_S) -> RunLock:
        """Hold ``directory``, which is made where it is missing; may take three beats where it was left locked.

        Raises UsageError when another run uses it, or when its file system holds no lock; RunError when its disk is
        full.
        """
        path, holder = directory / LOCK, this_process()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = _obtain(path, holder, beat_seconds)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise RunError(
                    f"there is no room for the lock of run.directory={directory} ({error.strerror}): make room; then "
                    "the same command continues"
                ) from error
            raise UsageError(
                f"run.directory={directory} cannot be locked ({error.strerror}): choose one that can be written"
            ) from error
        return cls(path, holder, file, beat_seconds)

    def check(self) -> None:
        """Raise RunError unless this process still holds the directory: to be called before a change that counts."""
        held: Holder | None = None
        for attempt in range(_READS):
            # A process that came too late to take over puts back in a moment what it has taken away.
            time.sleep(_READ_AGAIN_S if attempt else 0)
            try:
                held = parse(_read(self._path))
            except OSError as error:
                logger.warning("%s cannot be read: %s", self._path, error)
            if held is not None:
                break
        if held is None or held.token != self._holder.token:
            self._refuse(held)

    def release(self) -> None:
        """Let go, and remove the lock if it is still this process's."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join(_CLOSE_S)
        try:
            if has_token(self._holder.token)(_read(self._path)):
                _take_away(self._path, has_token(self._holder.token))
            self._file.close()
        except OSError as error:
            logger.warning("%s cannot be removed: %s", self._path, error)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _refuse(self, held: Holder | None) -> NoReturn:
        directory = self._path.parent
        if held is None:
            raise RunError(
                f"{self._path} is gone or cannot be read, so another run may use run.directory={directory}: this one "
                "ends without saving; the same command continues from the newest checkpoint"
            )
        self.lost = True
        raise RunError(
            f"another run has taken over run.directory={directory}, {held}: this one ends without saving, for it would "
            "overwrite what that one writes"
        )

    def _keep_beating(self) -> None:
        complained = False
        while not self._released.wait(self._beat_seconds):
            try:
                held = parse(_read(self._path))
                if held is not None and held.token != self._holder.token:
                    self.lost = True
                    logger.error("another run has taken over %s: %s", self._path.parent, held)
                    return
                self._beat += 1
                _write(self._file, self._holder, self._beat)
            except OSError as error:
                if not complained:
                    logger.warning("%s cannot be written, which others may take for the end: %s", self._path, error)
                complained = True


def _obtain(path: Path, holder: Holder, beat_seconds: float) -> BufferedRandom:
    while True:
        seen = _read(path)
        if seen is not None and not _make_way(path, seen, holder, beat_seconds):
            continue
        file = open_temporary(path)
        try:
            _write(file, holder, 0)
            if _give_name(Path(file.name), path):
                return file
        except OSError:
            discard(file)
            raise
        discard(file)


def _make_way(path: Path, seen: bytes, holder: Holder, beat_seconds: float) -> bool:
    """Take away a lock that nobody holds; whether it was still there. Raises UsageError when a run holds it."""
    former = parse(seen)
    if former is not None and is_gone(former):
        logger.info("run.directory=%s was left locked by %s, which has ended", path.parent, former)
        return _take_away(path, has_token(former.token))
    if former is not None and holder.is_restart_of(former):
        logger.warning("Slurm has started this job again: run.directory=%s is taken over from %s", path.parent, former)
        taken = _take_away(path, has_token(former.token))
        # It may live on, cut off from Slurm: give it time to see that its lock is gone.
        time.sleep(2 * beat_seconds if taken else 0)
        return taken
    now = _watched(path, seen, beat_seconds)
    if now is None:
        return False
    if now != seen:
        _refuse_use(path.parent, parse(now) or former)
    logger.warning("run.directory=%s is taken over from %s: no sign of life", path.parent, former or _SOMETHING)
    return _take_away(path, seen.__eq__)


def _watched(path: Path, seen: bytes, beat_seconds: float) -> bytes | None:
    """What the lock says as soon as it changes, or after three beats.

    Looks are counted, and not the time: a process that is stopped meanwhile sees none of the beats.
    """
    seconds, former = _WATCHED_BEATS * beat_seconds, parse(seen) or _SOMETHING
    logger.warning("run.directory=%s is locked by %s: %.0f s for a sign of life", path.parent, former, seconds)
    now: bytes | None = seen
    for _ in range(_WATCHED_BEATS * _LOOKS_PER_BEAT):
        time.sleep(beat_seconds / _LOOKS_PER_BEAT)
        now = _read(path)
        if now != seen:
            break
    return now


def _refuse_use(directory: Path, user: Holder | None) -> NoReturn:
    stop = f"touch {shlex.quote(str(directory / 'stop'))}"
    raise UsageError(
        f"run.directory={directory} is in use by {user or _SOMETHING}: wait for it, stop it with '{stop}', or "
        "choose another run.directory"
    )


def _give_name(source: Path, path: Path) -> bool:
    """Rename ``source`` to ``path`` if nothing has that name; of several that try, one succeeds."""
    try:
        os.link(source, path)
    except FileExistsError:
        # A network file system may repeat a request whose answer was lost.
        if source.stat().st_nlink < 2:
            return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _give_reserved_name(source, path)
    source.unlink(missing_ok=True)
    return True


def _give_reserved_name(source: Path, path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        return False
    source.replace(path)
    return True


def _take_away(path: Path, is_expected: Callable[[bytes], bool]) -> bool:
    """Remove the lock if it is the expected one still; of several that try, one succeeds."""
    if not is_expected(_read(path) or b""):
        return False
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return False
    try:
        if is_expected(aside.read_bytes()):
            return True
        _give_name(aside, path)  # somebody was faster, and this is the new one: put it back
        return False
    finally:
        aside.unlink(missing_ok=True)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _write(file: BufferedRandom, holder: Holder, beat: int) -> None:
    os.pwrite(file.fileno(), encode(holder, beat), 0)
    # Network file systems send what was written when a descriptor is closed. To sync would do so too, but on a disk it
    # may wait for a whole checkpoint that is written at the same time, and the beat would stand still.
    os.close(os.dup(file.fileno()))
