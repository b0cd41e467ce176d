"""Checkpoints that are no longer what they were, and other things that lie about when a run begins."""

from __future__ import annotations

import os
import random
import re
import shutil
import time
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path

from fault import Before, NotYetError, Scene
from life import Life
from remains import read_checkpoints

_FAR_S = 10 * 365 * 86400


class _Damage(Before):
    """Hits one file of the newest checkpoint; there must be a whole one before it."""

    setback = 1
    victim = "__*.distcp"

    def __init__(self, dice: random.Random, scene: Scene) -> None:
        super().__init__(dice, scene)
        self._where = dice.random()

    def inject(self) -> str:
        whole = read_checkpoints(self.scene.run).whole
        if len(whole) < 2:
            raise NotYetError
        folder = whole[max(whole)]
        files = sorted(folder.glob(self.victim))
        path = files[int(self._where * len(files))]
        self._step, self._name = folder.name, path.name
        return f"{folder.name}/{path.name}{self.harm(path)}"

    @abstractmethod
    def harm(self, path: Path) -> str:
        """Damage a file; returns what else there is to say about how."""

    def broken(self, life: Life) -> Iterable[str]:
        if not self._told(life):
            yield f"the damage of {self._step}/{self._name} is not told"

    def answer(self, life: Life) -> str:
        return self._told(life) or "nothing"

    def _told(self, life: Life) -> str | None:
        told = rf"{self._step} is damaged: {re.escape(self._name)} .+; it is now {self._step}\.damaged.*"
        found = re.search(told, life.console)
        return found[0] if found else None


class TruncatedShard(_Damage):
    kind = "truncated shard"

    def harm(self, path: Path) -> str:
        size = int(self._where * path.stat().st_size)
        os.truncate(path, size)
        return f" cut to {size:,} bytes"


class TruncatedManifest(TruncatedShard):
    kind = "truncated manifest"
    victim = "manifest.json"


class TruncatedState(TruncatedShard):
    kind = "truncated state.json"
    victim = "state.json"


class FlippedByte(_Damage):
    kind = "flipped byte in a shard"

    def harm(self, path: Path) -> str:
        data = bytearray(path.read_bytes())
        position = int(self._where * len(data))
        data[position] ^= 1 << self.dice.randrange(8)
        path.write_bytes(data)
        return f", byte {position:,}"


class MissingShard(_Damage):
    kind = "missing shard"

    def harm(self, path: Path) -> str:
        path.unlink()
        return " removed"


class UnfinishedFolder(Before):
    """What a save leaves that was cut off, here with a step of its own, so that it is known again."""

    kind = "unfinished folder left"
    _name = "step-00009999.writing"

    def inject(self) -> str:
        whole = read_checkpoints(self.scene.run).whole
        if not whole:
            raise NotYetError
        folder = whole[max(whole)]
        left = folder.with_name(self._name)
        left.mkdir()
        for path in self.dice.sample(sorted(folder.iterdir()), k=3):
            shutil.copy(path, left)
        self._newest = max(whole)
        return self._name

    def broken(self, life: Life) -> Iterable[str]:
        if read_checkpoints(life.run).newest > self._newest and (life.run.checkpoints / self._name).exists():
            yield f"{self._name} is still there after another save"

    def answer(self, life: Life) -> str:
        return "there until the next save" if (life.run.checkpoints / self._name).exists() else "removed"


class FarOffTimes(Before):
    """Files whose times are years off, in both directions, as clocks of file servers that are wrong leave them."""

    kind = "file times years off"

    def inject(self) -> str:
        if not read_checkpoints(self.scene.run).whole:
            raise NotYetError
        now = time.time()
        paths = [path for path in self.scene.run.directory.rglob("*") if path.name != "ballast"]
        for path in paths:
            then = now + self.dice.uniform(-_FAR_S, _FAR_S)
            os.utime(path, (then, then))
        return f"{len(paths)} files and folders"
