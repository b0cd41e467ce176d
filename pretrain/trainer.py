"""The story of a run: set up, resume, train, evaluate, save, stop."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from ..configs.checks import check_layout
from ..configs.errors import RunError
from ..configs.loading import dump_config, set_vocabulary
from ..configs.ramps import StepShape, shape_after, shapes_of
from ..configs.schema import Config
from ..data_pipeline.opening import PreparedData, read_prepared
from ..models.build import build_chunks, local_parameters
from ..parallel.engine import Engine, StepResult
from ..parallel.topology import Topology, build_topology, join, leave, leave_topology, sum_over_pipeline
from .banner import banner
from .console import Console, duration
from .metrics import Metrics, StepMetrics
from .place import Place
from .progress import Progress
from .run_data import RunData
from .saver import Saver

logger = logging.getLogger(__name__)

TRAINING_FLOPS = 3.0
"""Operations of a training step as multiples of its forward pass: each product has two gradients."""

SLOW_INTERVAL = 10
"""Steps between records of what moves slowly: lambda, of which each record is a small sum over the pipeline, and the
shares of the data's sources."""


def pretrain(config: Config, place: Place) -> None:
    """One rank's whole run, from joining the process group to leaving it.

    Raises:
        UsageError: the configuration does not fit the ranks, the data or the run's checkpoint.
        RunError: the run cannot go on.
    """
    prepared = read_prepared(config.data)
    config = set_vocabulary(config, prepared.vocabulary_size)
    layout = check_layout(config, place.world_size)
    topology = build_topology(layout, join(place.rank, place.world_size, place.local_rank))
    Trainer(config, topology, place, prepared).run()
    leave_topology()
    leave()


class Trainer:
    """One rank's part in a run."""

    def __init__(self, config: Config, topology: Topology, place: Place, prepared: PreparedData) -> None:
        self.config, self.topology, self.place = config, topology, place
        self.data = RunData(config, topology, prepared)
        self.chunks = build_chunks(config, topology)
        self.engine = Engine(self.chunks, config, topology)
        self.saver = Saver(config, self.engine, self.data)
        self.progress = Progress()
        self.validation_losses: list[float] = []
        self.flops_per_token = {length: self._model_flops(length) for length in self._lengths()}

    def run(self) -> None:
        """Train to ``train.steps``, from the newest checkpoint of the run's directory if it has one."""
        try:
            self._run()
        except BaseException:
            # A reader may hang in a file system that does not answer, while the other ranks wait for this one to end.
            self.data.close(wait=False)
            raise
        self.data.close()
        self.engine.close()

    def _run(self) -> None:
        restored = self.saver.restore()
        if restored is not None:
            self.progress = restored[1]
        self._open(restored[0] if restored else None)
        started, first = time.perf_counter(), self.progress
        if self.step == 0:
            self._evaluate()
        while self.step < self.config.train.steps:
            self._train_step()
            if self._evaluation_is_due():
                self._evaluate()
            if self.saver.is_due(self.step):
                self._save()
        self._save()
        self._close(time.perf_counter() - started, first)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    def _train_step(self) -> None:
        started, waited = time.perf_counter(), self.data.waited
        consumed = self.progress.samples
        shape = shape_after(self.config.train, consumed)
        result = self.engine.train_step(self.data.training(consumed, self.step + 1), shape)
        self.progress = self.progress.after(shape)
        if not result.finite:
            raise RunError(
                f"step {self.step} is not finite (loss {result.loss:g}, gradient norm {result.grad_norm:g}): lower "
                f"optimizer.learning_rate={self.config.optimizer.learning_rate:g} or optimizer.clip_grad="
                f"{self.config.optimizer.clip_grad:g}; the same command continues from the newest checkpoint"
            )
        self._record(result, shape, time.perf_counter() - started, self.data.waited - waited)

    def _record(self, result: StepResult, shape: StepShape, seconds: float, waited: float) -> None:
        flops = self.flops_per_token[shape.sequence_length] * shape.tokens
        metrics = StepMetrics(
            step=self.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=result.learning_rate,
            tokens=self.progress.tokens,
            consumed_samples=self.progress.samples,
            batch_size=shape.samples,
            sequence_length=shape.sequence_length,
            step_time_s=seconds,
            data_time_s=waited,
            tokens_per_s=shape.tokens / seconds,
            tflops_per_rank=flops / seconds / self.topology.layout.world_size / 1e12,
        )
        logger.info("step %d: loss %.6f, grad norm %.4f", metrics.step, metrics.loss, metrics.grad_norm)
        if self.metrics is not None:
            self.metrics.step(metrics)
        if self.step % SLOW_INTERVAL == 0:
            self._record_slow()
        self.console.step(metrics)

    def _record_slow(self) -> None:
        lambdas = self._lambdas()
        if self.metrics is not None:
            values = {f"diff/lambda/layer_{layer:02d}": value for layer, value in lambdas.items()}
            values |= self.data.mixture_values(self.progress.samples)
            self.metrics.values(self.step, values | {"data/skipped_samples": float(self.data.skipped_samples)})

    def _evaluation_is_due(self) -> bool:
        interval = self.config.evaluation.interval
        last = self.step == self.config.train.steps
        return interval > 0 and (self.step % interval == 0 or last)

    def _evaluate(self) -> None:
        if self.config.evaluation.interval == 0:
            return
        count = self.config.evaluation.batches * self.topology.layout.num_microbatches
        loss = self.engine.evaluate(self.data.validation(self.step), count)
        self.validation_losses.append(loss)
        if self.metrics is not None:
            self.metrics.evaluation(self.step, self.progress.samples, loss)
        self.console.say(f"step {self.step}: validation loss {loss:.4f}")

    def _save(self) -> None:
        if self.metrics is not None:
            self.metrics.flush()
        self.saver.save(self.progress)

    def _open(self, resumed_from: Path | None) -> None:
        directory, first = self.config.run.directory, self.topology.rank == 0
        parameters = self._stage_parameters()
        self.console = Console(self.config.train.steps, self.step, enabled=first)
        self.metrics: Metrics | None = None
        if first and self.step < self.config.train.steps:
            directory.mkdir(parents=True, exist_ok=True)
            resolved = dump_config(self.config)
            (directory / "config.yaml").write_text(resolved)
            self.metrics = Metrics(directory, resolved, self.step, self.progress.samples)
        if self.step < self.config.train.steps:
            self.data.open_records(self.step)
        self.console.say(banner(self.config, self.topology, self.place, parameters, self.data.describe(), resumed_from))

    def _close(self, seconds: float, first: Progress) -> None:
        self.console.close()
        if self.metrics is not None:
            self.metrics.close()
        self.console.say(self._summary(seconds, first))

    def _summary(self, seconds: float, first: Progress) -> str:
        directory, train = self.config.run.directory, self.config.train
        steps, tokens = self.step - first.step, self.progress.tokens - first.tokens
        if steps == 0:
            done = f"nothing to do: all {train.steps} steps were done before; raise train.steps to train further"
        else:
            done = f"{steps} step{'s' if steps > 1 else ''}, {tokens:,} tokens in {duration(seconds)}"
        lines = ["finished: " + done]
        if self.validation_losses:
            ends = [self.validation_losses[0], *self.validation_losses[1:][-1:]]
            lines.append(f"  validation   loss {' -> '.join(f'{loss:.3f}' for loss in ends)} nats per token")
        if self.data.skipped_samples:
            lines.append(f"  damaged      {self.data.skipped_samples} samples replaced: {directory / 'skipped.jsonl'}")
        lines += [
            f"  metrics      {directory / 'metrics.jsonl'}",
            f"  TensorBoard  tensorboard --logdir {directory}",
            f"  checkpoint   {self.saver.newest()}",
        ]
        return "\n".join(lines)

    def _stage_parameters(self) -> list[int]:
        stage = self.topology.pipeline_rank
        own = {stage: float(local_parameters(self.chunks))}
        counts = sum_over_pipeline(own, self.topology.layout.pipeline, self.topology)
        return [round(count) for count in counts]

    def _lengths(self) -> list[int]:
        return sorted({shape.sequence_length for shape in shapes_of(self.config.train)})

    def _model_flops(self, sequence_length: int) -> float:
        forward = sum(chunk.flops_per_token(sequence_length) for chunk in self.chunks)
        return TRAINING_FLOPS * sum_over_pipeline({0: forward}, 1, self.topology)[0]

    def _lambdas(self) -> dict[int, float]:
        plans = self.chunks[0].plans
        own = {layer: value for chunk in self.chunks for layer, value in chunk.lambdas().items()}
        values = sum_over_pipeline(own, len(plans), self.topology)
        return {plan.index: values[plan.index] for plan in plans if plan.has_lambda}
