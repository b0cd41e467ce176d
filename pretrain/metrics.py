"""What a run records: one JSON object per step and per evaluation, and the same in TensorBoard.

Tag names that Megatron-LM has are kept, so that its dashboards work.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .checkpoints.folder import step_of
from .checkpoints.saving import Saved
from .journal import Journal

logger = logging.getLogger(__name__)

_STEP_TAGS = {
    "loss": "lm loss",
    "lr": "learning-rate",
    "grad_norm": "grad-norm",
    "step_time_s": "iteration-time",
    "tokens": "train/tokens_seen",
    "data_time_s": "time/data",
    "batch_size": "batch-size",
    "sequence_length": "train/sequence_length",
    "tokens_per_s": "perf/tokens_per_sec",
    "tflops_per_rank": "throughput",
}
_VERSUS_SAMPLES = ("lm loss", "learning-rate", "grad-norm")


@dataclass(frozen=True)
class StepMetrics:
    """One training step; field names are those of ``metrics.jsonl``."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean negative log-likelihood per token of the step's global batch, in nats."""
    grad_norm: float
    lr: float
    tokens: int
    """Tokens trained on since the start of the run."""
    consumed_samples: int
    batch_size: int
    """Samples of the step."""
    sequence_length: int
    step_time_s: float
    data_time_s: float
    """Part of ``step_time_s`` in which rank 0 waited for data."""
    tokens_per_s: float
    tflops_per_rank: float | None
    """Model operations (forward and backward, recomputation not counted) per second and rank, in 1e12; None where FP8
    is emulated, whose speed says nothing."""
    skipped: bool = False
    """Whether the step changed no parameter (``watch``)."""


class Metrics:
    """Writes ``metrics.jsonl`` and TensorBoard events. Only one rank of a run holds one."""

    def __init__(self, directory: Path, resolved_config: str, first_step: int, consumed_samples: int) -> None:
        """Continue after ``first_step`` steps: what an interrupted run recorded beyond is forgotten."""
        self._journal = Journal(directory / "metrics.jsonl", first_step)
        self._board = _Board(directory / "tensorboard", first_step)
        # Forgetting goes by position, so curves over samples need a writer of their own.
        self._samples_board = _Board(directory / "tensorboard" / "samples", consumed_samples)
        self._board.write(lambda w: w.add_text("config", f"```yaml\n{resolved_config}\n```", first_step))

    def step(self, metrics: StepMetrics) -> None:
        """Record a training step."""
        values = asdict(metrics)
        self._journal.write(values)
        known = {tag: values[name] for name, tag in _STEP_TAGS.items() if values[name] is not None}
        tags = {tag: value for tag, value in known.items() if math.isfinite(value)}
        self._board.scalars(tags, metrics.step)
        versus = {f"{tag} vs samples": tags[tag] for tag in _VERSUS_SAMPLES if tag in tags}
        self._samples_board.scalars(versus, metrics.consumed_samples)

    def evaluation(self, step: int, consumed_samples: int, loss: float) -> None:
        """Record a validation loss."""
        values = {"step": step, "consumed_samples": consumed_samples, "validation_loss": loss}
        self._journal.write(values)
        tags = {"lm loss validation": loss, "lm loss validation ppl": math.exp(min(20.0, loss))}
        self._board.scalars(tags, step)

    def record(self, step: int, tags: Mapping[str, float]) -> None:
        """Record values in both."""
        self._journal.write({"step": step, **tags})
        self._board.scalars({tag: value for tag, value in tags.items() if math.isfinite(value)}, step)

    def saved(self, saved: Saved) -> None:
        """Record a finished checkpoint."""
        step = step_of(saved.path)
        values = {"step": step, "checkpoint": saved.path.name, "stall_s": saved.stall_s, "total_s": saved.total_s}
        self._journal.write(values)
        self._board.scalars({"time/ckpt_blocking": saved.stall_s, "time/ckpt_total": saved.total_s}, step)

    def go_back(self, step: int, consumed_samples: int) -> None:
        """Forget what was recorded after ``step``, to which the run has gone back."""
        self._journal.forget_after(step)
        self._board.go_back(step)
        self._samples_board.go_back(consumed_samples)

    def values(self, step: int, tags: Mapping[str, float]) -> None:
        """Record values in TensorBoard alone."""
        self._board.scalars(tags, step)

    def flush(self) -> None:
        """Bring everything to disk: what a checkpoint covers must not be lost with the process."""
        self._journal.flush()
        for board in (self._board, self._samples_board):
            board.write(lambda w: w.flush())

    def close(self) -> None:
        """Flush and close everything."""
        self._journal.close()
        for board in (self._board, self._samples_board):
            board.write(lambda w: w.close())


class _Board:
    """A TensorBoard writer whose failure is reported once and never ends a run."""

    def __init__(self, directory: Path, last_position: int) -> None:
        """Continue after ``last_position``: what lies beyond, and everything before a first step, is hidden."""
        self._directory = directory
        self._open(last_position)

    def scalars(self, tags: Mapping[str, float], position: int) -> None:
        self.write(lambda w: [w.add_scalar(tag, value, position) for tag, value in tags.items()])

    def write(self, action: Callable[[Any], object]) -> None:
        if self._writer is None:
            return
        try:
            action(self._writer)
        except OSError as error:
            self._give_up(error)

    def go_back(self, last_position: int) -> None:
        """Hide what lies beyond ``last_position``."""
        if self._writer is not None:
            self.write(lambda w: w.close())
            self._open(last_position)

    def _open(self, last_position: int) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._directory), purge_step=last_position + 1 if last_position else 0)
        except (OSError, ImportError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("TensorBoard is off for the rest of this run: %s", error)
        self._writer = None
