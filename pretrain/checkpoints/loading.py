"""Finding the newest checkpoint that is whole, and loading it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...configs.errors import RunError
from ...configs.schema import Checkpoint
from ...parallel.agreement import done_by_first_rank, together, union_over_ranks
from ...parallel.engine import Engine
from ...parallel.random_states import RandomStates
from ...parallel.tensor_files import load_tensors
from ...parallel.topology import Topology
from . import folder
from .manifest import RANDOM, DamageError, FileEntry, Problem, problems, read_manifest, read_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A checkpoint that has been verified."""

    path: Path
    state: dict[str, Any]
    """All of ``state.json``: ``step``, ``scheduler``, ``updates`` and the caller's ``run``."""

    @property
    def run(self) -> dict[str, Any]:
        """The caller's own state."""
        own: dict[str, Any] = self.state["run"]
        return own


def find(root: Path, topology: Topology, settings: Checkpoint) -> Found | None:
    """The newest checkpoint whose every file is what was written. Every rank must call it and gets the same.

    Rank 0 looks, since two ranks may see different names through a network file system; each rank reads its share of
    the files. A damaged one is set aside and the one before it is tried, where ``on_damage`` allows that.

    Raises:
        RunError: the newest is damaged and ``on_damage`` is ``stop``, or none is whole.
    """
    while (path := done_by_first_rank(lambda: folder.newest(root))) is not None:
        problem = _problem(path, topology)
        if problem is None:
            return Found(path, done_by_first_rank(lambda: read_state(path)))
        _give_up(path, problem, settings)
    if done_by_first_rank(lambda: folder.damaged(root)):
        raise RunError(
            f"no checkpoint in {root} is whole: repair or remove the damaged ones, or choose another run.directory "
            "to begin anew"
        )
    return None


def load(found: Found, engine: Engine) -> None:
    """Bring the engine to where the checkpoint's was. Every rank must call it.

    Raises:
        RunError: the checkpoint is of another model.
    """
    load_tensors(found.path, engine)
    engine.updates = found.state["updates"]
    engine.restore_schedule(found.state["scheduler"])
    engine.fp8.restore(found.state.get("fp8"))
    states = done_by_first_rank(lambda: RandomStates.read(found.path / RANDOM))
    topology = engine.topology
    if len(states) == topology.layout.world_size:
        states[topology.rank].restore(topology.device)
    else:
        logger.info("the random states of %d ranks are not those of %d", len(states), topology.layout.world_size)


def _problem(path: Path, topology: Topology) -> str | None:
    """What is wrong with a checkpoint, if anything is; the same on every rank."""
    files, damage = done_by_first_rank(lambda: _manifest(path))
    if damage is not None:
        return damage
    names = sorted(files)[topology.rank :: topology.layout.world_size]
    own = together(lambda: _first_problem(path, {name: files[name] for name in names}), topology)
    told = union_over_ranks(own, topology)
    outages = [sentence for sentence, is_damage in told.items() if not is_damage]
    if outages:
        raise RunError(outages[0])
    return next(iter(told), None)


def _manifest(path: Path) -> tuple[dict[str, FileEntry], str | None]:
    try:
        return read_manifest(path), None
    except DamageError as damage:
        return {}, str(damage)
    except OSError as error:
        raise RunError(_outage(path, error)) from error


def _first_problem(path: Path, files: dict[str, FileEntry]) -> dict[str, bool]:
    """The sentence about this rank's first file that is not as it was, and whether that is damage or an outage."""
    try:
        found: Problem | None = next(iter(problems(path, files)), None)
    except OSError as error:
        return {_outage(path, error): False}
    return {str(DamageError(path, found)): True} if found else {}


def _outage(path: Path, error: OSError) -> str:
    return f"checkpoint {path} cannot be read: {error.filename}: {error.strerror}"


def _give_up(path: Path, problem: str, settings: Checkpoint) -> None:
    if settings.on_damage == "stop":
        raise RunError(f"{problem}; remove it to continue from the one before, or set checkpoint.on_damage=fall_back")
    aside = done_by_first_rank(lambda: folder.set_aside(path))
    logger.warning("%s; it is now %s, and the one before it is used", problem, aside.name)
