"""When a run saves, what a save that fails does to it, and how it finds its way back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..configs.errors import RunError, UsageError
from ..configs.schema import Config
from ..parallel.agreement import done_by_first_rank
from ..parallel.engine import Engine
from .checkpoints import folder, loading
from .checkpoints.loading import Found
from .checkpoints.saving import CheckpointWriter, Saved

logger = logging.getLogger(__name__)


class Saver:
    """Saves beside the training; finds the newest checkpoint that is whole. Every rank calls the same methods."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        told: Callable[[Saved], object] = lambda _: None,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        """``told`` hears of every checkpoint that is complete; ``fence``, which only rank 0 asks, raises RunError where
        this run may no longer write in its folder."""
        self._config, self._engine, self._told, self._fence = config, engine, told, fence
        self._root = config.checkpoint_directory
        self._writer = CheckpointWriter(self._root, engine, config.checkpoint)
        self._step: int | None = None
        """The step of the newest checkpoint that is complete or being written."""
        self._failures = 0

    def find(self) -> Found | None:
        """The newest checkpoint that is whole, if there is one, after a check that it is one of this model.

        Raises:
            UsageError: it belongs to another model.
            RunError: it is damaged, and ``checkpoint.on_damage`` is ``stop``, or none is whole.
        """
        done_by_first_rank(self._fence)
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

    def begin(self, step: int, state: dict[str, Any]) -> None:
        """Begin to write a checkpoint of this point, unless there is one.

        Raises:
            RunError: it cannot be begun, and ``checkpoint.on_failure`` says that this ends the run; or the run may no
                longer write.
        """
        if step == self._step:
            return
        self.finish()
        done_by_first_rank(self._fence)
        try:
            self._writer.begin(step, self._own(state))
        except RunError as error:
            self._failed(error)
            return
        self._step = step
        if not self._config.checkpoint.background:
            self.finish()

    def finish(self) -> None:
        """Complete the checkpoint that is being written, if one is.

        Raises:
            RunError: as ``begin``.
        """
        if not self._writer.pending:
            return
        done_by_first_rank(self._fence)
        try:
            self._complete()
        except RunError as error:
            self._step = None
            self._failed(error)

    def save_last(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint of this point and wait for it, unless there is one: a run must not end without it.

        Raises:
            RunError: it cannot be written.
        """
        self.finish()
        if step != self._step:
            done_by_first_rank(self._fence)
            self._writer.begin(step, self._own(state))
            self._complete()
            self._step = step

    def replace(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint of this point in the place of the one of the same step, and wait for it.

        Raises:
            RunError: as ``begin``.
        """
        self._step = None
        self.begin(step, state)
        self.finish()

    def _complete(self) -> None:
        saved = self._writer.finish()
        if saved is None:
            return
        self._failures = 0
        logger.info(
            "saved %s: %.1f MB in %.2f s, for %.3f s of which training waited",
            saved.path, saved.bytes / 1e6, saved.total_s, saved.stall_s,
        )  # fmt: skip
        self._told(saved)

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
