"""What a run tells: its banner, its metrics, its events, its summary. Rank 0 writes; every rank takes part in sums."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from ..configs.errors import RunError
from ..configs.loading import dump_config
from ..configs.ramps import StepShape, shapes_of
from ..data_pipeline.durable import write_durably
from ..models.build import local_parameters
from ..parallel.engine import Engine
from ..parallel.topology import sum_over_pipeline
from .attempts import Attempts
from .banner import banner
from .checkpoints import folder
from .checkpoints.saving import Saved
from .console import Console, duration
from .journal import Journal
from .metrics import Metrics, StepMetrics
from .place import Place
from .progress import Progress
from .run_data import RunData

logger = logging.getLogger(__name__)

TRAINING_FLOPS = 3.0
"""Operations of a training step as multiples of its forward pass: each product has two gradients."""

_ALL_STEPS = sys.maxsize


class Reporter:
    """Everything that a run leaves behind beside checkpoints."""

    def __init__(self, engine: Engine, place: Place, data: RunData) -> None:
        self._config, self._topology, self._place = engine.config, engine.topology, place
        self._engine, self._chunks, self._data = engine, engine.chunks, data
        self._writes = engine.topology.rank == 0
        self._console: Console | None = None
        self._metrics: Metrics | None = None
        self._events: Journal | None = None
        self._attempts: Attempts | None = None
        self._validation_losses: list[float] = []
        self._first = Progress()
        lengths = sorted({shape.sequence_length for shape in shapes_of(engine.config.train)})
        self._flops_per_token = {length: self._model_flops(length) for length in lengths}

    def open(self, progress: Progress, productive_s: float, resumed_from: Path | None) -> None:
        """Begin to report at ``progress``. Every rank must call it."""
        config, first = self._config, progress
        self._first = first
        parameters = self._stage_parameters()
        self._console = Console(config.train.steps, first.step, enabled=self._writes)
        if self._writes and first.step < config.train.steps:
            self._open_files(first, productive_s)
        text = banner(config, self._topology, self._place, parameters, self._data.describe(), resumed_from)
        self._console.say(text)

    def _open_files(self, first: Progress, productive_s: float) -> None:
        directory, resolved = self._config.run.directory, dump_config(self._config)
        directory.mkdir(parents=True, exist_ok=True)
        try:
            write_durably(directory / "config.yaml", resolved.encode())
        except OSError as error:
            raise RunError(
                f"{directory / 'config.yaml'} cannot be written ({error.strerror}): make room; then the same command "
                "continues"
            ) from error
        self._metrics = Metrics(directory, resolved, first.step, first.samples)
        self._events = Journal(directory / "events.jsonl", _ALL_STEPS)
        self._attempts = Attempts.begin(directory, first.step, productive_s)
        self.event("began", first.step, attempt=self._attempts.number, ranks=self._topology.layout.world_size)

    @property
    def productive_s(self) -> float:
        """Seconds of the steps that count, over all attempts; known to the rank that writes."""
        return self._attempts.productive_s if self._attempts else 0.0

    def step(
        self,
        progress: Progress,
        shape: StepShape,
        numbers: dict[str, float],
        *,
        seconds: float,
        waited: float,
        skipped: bool,
    ) -> None:
        """Report a step; ``numbers`` are its loss, grad_norm and lr."""
        flops = self._flops_per_token[shape.sequence_length] * shape.tokens
        fp8 = self._config.precision.fp8
        emulated = fp8 is not None and fp8.backend == "emulate"
        metrics = StepMetrics(
            step=progress.step,
            **numbers,
            tokens=progress.tokens,
            consumed_samples=progress.samples,
            batch_size=shape.samples,
            sequence_length=shape.sequence_length,
            step_time_s=seconds,
            data_time_s=waited,
            tokens_per_s=shape.tokens / seconds,
            tflops_per_rank=None if emulated else flops / seconds / self._topology.layout.world_size / 1e12,
            skipped=skipped,
        )
        logger.info("step %d: loss %.6f, grad norm %.4f", metrics.step, metrics.loss, metrics.grad_norm)
        if self._metrics is not None:
            self._metrics.step(metrics)
        if self._attempts is not None:
            self._attempts.step_done(progress.step, seconds, counts=not skipped)
        if self._console is not None:
            self._console.step(metrics)

    def slow(self, progress: Progress, counters: dict[str, float]) -> None:
        """Report what moves slowly. Every rank must call it."""
        lambdas = self._lambdas()
        if self._metrics is None or self._attempts is None:
            return
        goodput = self._attempts.goodput()
        values = {f"diff/lambda/layer_{layer:02d}": value for layer, value in lambdas.items()}
        values |= self._data.mixture_values(progress.samples) | counters
        values["data/skipped_samples"] = float(self._data.skipped_samples)
        values["resilience/goodput"] = goodput.fraction
        values["resilience/lost_seconds"] = goodput.up_s - goodput.productive_s
        values["resilience/attempt"] = float(self._attempts.number)
        self._metrics.values(progress.step, values)

    def values(self, step: int, values: dict[str, float]) -> None:
        """Report values in TensorBoard alone."""
        if self._metrics is not None:
            self._metrics.values(step, values)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Report values in ``metrics.jsonl`` and TensorBoard; nothing where there are none."""
        if self._metrics is not None and values:
            self._metrics.record(step, values)

    def evaluation(self, progress: Progress, loss: float) -> None:
        """Report a validation loss."""
        self._validation_losses.append(loss)
        if self._metrics is not None:
            self._metrics.evaluation(progress.step, progress.samples, loss)
        self.say(f"step {progress.step}: validation loss {loss:.4f}")

    def saved(self, saved: Saved) -> None:
        """Report a finished checkpoint."""
        if self._attempts is not None:
            self._attempts.write()
        if self._metrics is not None:
            self._metrics.saved(saved)

    def event(self, name: str, step: int, **details: Any) -> None:
        """Note something out of the ordinary, which stays in ``events.jsonl`` whatever is repeated."""
        if self._events is not None:
            self._events.write({"step": step, "event": name, **details})

    def go_back(self, progress: Progress, productive_s: float) -> None:
        """Forget what was reported after ``progress``, to which the run has gone back."""
        if self._metrics is not None:
            self._metrics.go_back(progress.step, progress.samples)
        if self._attempts is not None:
            self._attempts.productive_s = productive_s

    def say(self, text: str) -> None:
        """Tell the person who watches."""
        if self._console is not None:
            self._console.say(text)

    def flush(self) -> None:
        """Bring the metrics to disk: what a checkpoint covers must not be lost with the process."""
        self._data.flush()
        if self._metrics is not None:
            self._metrics.flush()

    def close(self, step: int, how: str) -> None:
        """End the files, after an attempt that ended as ``how`` says."""
        self.event("ended", step, how=how)
        if self._attempts is not None:
            self._attempts.end(how)
        if self._console is not None:
            self._console.close()
        if self._metrics is not None:
            self._metrics.close()
        if self._events is not None:
            self._events.close()

    def summarise(self, progress: Progress, seconds: float, how: str) -> None:
        """Say what there is to say at the end; ``how`` is its first word."""
        if self._writes:
            self.say(self._summary(progress, seconds, how))

    def _summary(self, progress: Progress, seconds: float, how: str) -> str:
        directory, train, first = self._config.run.directory, self._config.train, self._first
        steps, tokens = max(0, progress.step - first.step), max(0, progress.tokens - first.tokens)
        if steps == 0 and progress.step >= train.steps:
            done = f"nothing to do: all {train.steps} steps were done before; raise train.steps to train further"
        else:
            done = f"{steps} step{'' if steps == 1 else 's'}, {tokens:,} tokens in {duration(seconds)}"
        lines = [f"{how}: {done}"]
        if self._validation_losses:
            ends = [self._validation_losses[0], *self._validation_losses[1:][-1:]]
            lines.append(f"  validation   loss {' -> '.join(f'{loss:.3f}' for loss in ends)} nats per token")
        if self._data.skipped_samples:
            lines.append(f"  damaged      {self._data.skipped_samples} samples replaced: {directory / 'skipped.jsonl'}")
        if self._attempts is not None:
            lines.append(f"  goodput      {self._goodput(self._attempts)}")
        lines += [
            f"  metrics      {directory / 'metrics.jsonl'}",
            f"  TensorBoard  tensorboard --logdir {directory}",
            f"  checkpoint   {folder.newest(self._config.checkpoint_directory) or 'none'}",
        ]
        return "\n".join(lines)

    def _goodput(self, attempts: Attempts) -> str:
        goodput, count = attempts.goodput(), attempts.number
        return (
            f"{goodput.fraction:.1%}: {duration(goodput.productive_s)} of steps in {duration(goodput.up_s)} "
            f"of {count} attempt{'' if count == 1 else 's'}"
        )

    def _stage_parameters(self) -> list[int]:
        stage = self._topology.pipeline_rank
        own = {stage: float(local_parameters(self._chunks))}
        counts = sum_over_pipeline(own, self._topology.layout.pipeline, self._topology)
        return [round(count) for count in counts]

    def _model_flops(self, sequence_length: int) -> float:
        forward = sum(chunk.flops_per_token(sequence_length) for chunk in self._chunks)
        return TRAINING_FLOPS * sum_over_pipeline({0: forward}, 1, self._topology)[0]

    def _lambdas(self) -> dict[int, float]:
        plans = self._chunks[0].plans
        heads = {layer: one for chunk in self._chunks for layer, one in chunk.differential_layers().items()}
        with self._engine.whole([vector for one in heads.values() for vector in one.parameters()]):
            own = {layer: one.current_lambda().item() for layer, one in heads.items()}
        values = sum_over_pipeline(own, len(plans), self._topology)
        return {plan.index: values[plan.index] for plan in plans if plan.has_lambda}
