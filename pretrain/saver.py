"""When a run saves, and how it finds its way back."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..configs.errors import UsageError
from ..configs.schema import Config
from ..parallel import checkpoint
from ..parallel.engine import Engine
from .progress import Progress
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

    def restore(self) -> tuple[Path, Progress] | None:
        """Load the newest checkpoint, if there is one; returns it and how far it had come.

        Raises:
            UsageError: it belongs to another model, or to other data without ``data.on_change=accept``.
            RunError: it is damaged.
        """
        found = checkpoint.find(self._root)
        if found is None:
            return None
        path, state = found
        _check_same_model(path, state["model"], self._model())
        self._data.restore(state["data"])
        _check_same(path, "precision.compute", state["compute"], self._config.precision.compute)
        checkpoint.load(path, self._engine)
        progress = Progress(**state["progress"])
        self._saved_step = progress.step
        return path, progress

    def is_due(self, step: int) -> bool:
        """Whether step ``step`` ends with a save at the interval."""
        interval = self._config.checkpoint.interval
        return interval > 0 and step % interval == 0

    def save(self, progress: Progress) -> Path | None:
        """Write a checkpoint at this point of the run, unless it is there already."""
        step = progress.step
        if step == self._saved_step:
            return None
        path = checkpoint.save(self._root, step, self._engine, self._state(progress), self._config.checkpoint.keep)
        self._saved_step = step
        logger.info("saved %s", path)
        return path

    def _state(self, progress: Progress) -> dict[str, Any]:
        return {
            "progress": asdict(progress),
            "compute": self._config.precision.compute,
            "data": self._data.state(progress.samples),
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
