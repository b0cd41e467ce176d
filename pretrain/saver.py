"""When a run saves, and how it finds its way back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..configs.errors import UsageError
from ..configs.schema import Config
from ..parallel import checkpoint
from ..parallel.engine import Engine
from .run_data import RunData

logger = logging.getLogger(__name__)


class Saver:
    """Saves at an interval and at the end; restores the newest checkpoint of the run's directory."""

    def __init__(self, config: Config, engine: Engine, data: RunData) -> None:
        self._config, self._engine, self._data = config, engine, data
        self._root = config.checkpoint_directory
        self._saved_step: int | None = None

    def newest(self) -> Path | None:
        """The newest checkpoint on disk."""
        return checkpoint.newest(self._root)

    def restore(self) -> tuple[Path, int] | None:
        """Load the newest checkpoint, if there is one; returns it and the number of steps done.

        Raises:
            UsageError: it belongs to another model, other data, another seed or another length.
            RunError: it is damaged.
        """
        found = checkpoint.find(self._root)
        if found is None:
            return None
        path, state = found
        _check_same_model(path, state["model"], self._model())
        self._data.check_state(state["data"])
        _check_same(path, "train.global_batch_size", state["global_batch_size"], self._config.train.global_batch_size)
        _check_same(path, "precision.compute", state["compute"], self._config.precision.compute)
        checkpoint.load(path, self._engine)
        self._saved_step = int(state["step"])
        return path, self._saved_step

    def is_due(self, step: int) -> bool:
        """Whether step ``step`` ends with a save at the interval."""
        interval = self._config.checkpoint.interval
        return interval > 0 and step % interval == 0

    def save(self, step: int) -> Path | None:
        """Write a checkpoint after ``step`` steps, unless it is there already."""
        if step == self._saved_step:
            return None
        path = checkpoint.save(self._root, step, self._engine, self._state(step), self._config.checkpoint.keep)
        self._saved_step = step
        logger.info("saved %s", path)
        return path

    def _state(self, step: int) -> dict[str, Any]:
        batch = self._config.train.global_batch_size
        return {
            "step": step,
            "global_batch_size": batch,
            "compute": self._config.precision.compute,
            "data": self._data.state(step * batch),
            "model": self._model(),
        }

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
