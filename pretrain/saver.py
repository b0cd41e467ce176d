"""When a run saves, what a save that fails does to it, and how it finds its way back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..configs.errors import RunError, UsageError
from ..configs.schema import Config
from ..parallel.engine import Engine
from .checkpoints import folder, loading
from .checkpoints.loading import Found
from .checkpoints.saving import CheckpointWriter, Saved

logger = logging.getLogger(__name__)


class Saver:
    """Saves beside the training; finds the newest checkpoint that is whole. Every rank calls the same methods."""

    def __init__(self, config: Config, engine: Engine, fence: Callable[[], None] = lambda: None) -> None:
        """``fence`` raises RunError where this run may no longer write in its folder."""
        self._config, self._engine = config, engine
        self._root = config.checkpoint_directory
        self._writer = CheckpointWriter(self._root, engine, config.checkpoint, fence)
        self._step: int | None = None
        """The step of the newest checkpoint that is complete or being written."""
        self._failures = 0

    def newest(self) -> Path | None:
        """The newest checkpoint on disk."""
        return folder.newest(self._root)

    def find(self) -> Found | None:
        """The newest checkpoint that is whole, if there is one, after a check that it is one of this model.

        Raises:
            UsageError: it belongs to another model.
            RunError: it is damaged, and ``checkpoint.on_damage`` is ``stop``, or none is whole.
        """
        found = loading.find(self._root, self._engine.topology, self._config.checkpoint)
        if found is not None:
            _check_same_model(found.path, found.run["model"], self._model())
            _check_same(found.path, "precision.compute", found.run["compute"], self._config.precision.compute)
        return found

    def load(self, found: Found) -> None:
        """Bring the engine to where ``found`` was saved."""
        loading.load(found, self._engine)
        self._step = folder.step_of(found.path)

    def is_due(self, step: int) -> bool:
        """Whether step ``step`` ends with a save at the interval."""
        interval = self._config.checkpoint.interval
        return interval > 0 and step % interval == 0

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writer.pending

    @property
    def busy(self) -> bool:
        """Whether this rank still writes files of one."""
        return self._writer.busy

    def begin(self, step: int, state: dict[str, Any]) -> Saved | None:
        """Begin to write a checkpoint of this point, unless there is one; returns what was finished meanwhile.

        Raises:
            RunError: it cannot be begun, and ``checkpoint.on_failure`` says that this ends the run.
        """
        if step == self._step:
            return None
        finished = self.finish()
        try:
            self._writer.begin(step, self._own(state))
        except RunError as error:
            self._failed(error)
            return finished
        self._step = step
        return finished if self._config.checkpoint.background else self.finish()

    def finish(self) -> Saved | None:
        """Complete the checkpoint that is being written, if one is.

        Raises:
            RunError: it cannot be, and ``checkpoint.on_failure`` says that this ends the run.
        """
        try:
            saved = self._writer.finish()
        except RunError as error:
            self._step = None
            self._failed(error)
            return None
        if saved is not None:
            self._failures = 0
            logger.info(
                "saved %s: %.1f MB in %.2f s, for %.3f s of which training waited",
                saved.path, saved.bytes / 1e6, saved.total_s, saved.stall_s,
            )  # fmt: skip
        return saved

    def save_last(self, step: int, state: dict[str, Any]) -> Saved | None:
        """Write a checkpoint of this point and wait for it, unless there is one: a run must not end without it.

        Raises:
            RunError: it cannot be written.
        """
        finished = self.finish()
        if step == self._step:
            return finished
        self._writer.begin(step, self._own(state))
        saved = self._writer.finish()
        self._step = step
        return saved

    def _failed(self, error: RunError) -> None:
        self._failures += 1
        settings = self._config.checkpoint
        if settings.on_failure == "stop":
            raise error
        if self._failures >= settings.failure_budget:
            raise RunError(f"{error}; it is the {self._failures}th failure in a row (checkpoint.failure_budget)")
        logger.warning("%s; the run goes on (checkpoint.on_failure=continue)", error)

    def _own(self, state: dict[str, Any]) -> dict[str, Any]:
        return {"compute": self._config.precision.compute, "model": self._model(), **state}

    def _model(self) -> dict[str, Any]:
        return self._config.model.model_dump(mode="json")


def _check_same_model(path: Path, saved: dict[str, Any], configured: dict[str, Any]) -> None:
    for key in sorted(saved.keys() | configured.keys()):
        if saved.get(key) != configured.get(key):
            raise UsageError(
                f"checkpoint {path} holds another model: model.{key} was {saved.get(key)} and is now "
                f"{configured.get(key)}; set it back or choose another run.directory"
            )


def _check_same(path: Path, key: str, saved: object, configured: object) -> None:
    if saved != configured:
        raise UsageError(
            f"checkpoint {path} was made with {key}={saved}, now {configured}: "
            "set it back or choose another run.directory"
        )
