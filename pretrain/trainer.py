"""The story of a run: set up, resume, train, evaluate, save, stop."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from ..configs.checks import check_layout
from ..configs.errors import RunError
from ..configs.loading import dump_config, set_vocabulary
from ..configs.schema import Config
from ..data_pipeline.manifest import load_manifest
from ..models.build import build_chunks, local_parameters
from ..parallel.engine import Engine, StepResult
from ..parallel.topology import Topology, build_topology, join, leave, leave_topology, sum_over_pipeline
from .banner import banner
from .console import Console, duration
from .metrics import Metrics, StepMetrics
from .place import Place
from .run_data import RunData
from .saver import Saver

logger = logging.getLogger(__name__)

TRAINING_FLOPS = 3.0
"""Operations of a training step as multiples of its forward pass: each product has two gradients."""

LAMBDA_INTERVAL = 10
"""Steps between records of lambda: it moves slowly, and each record is a small sum over the pipeline."""


def pretrain(config: Config, place: Place) -> None:
    """One rank's whole run, from joining the process group to leaving it.

    Raises:
        UsageError: the configuration does not fit the ranks, the data or the run's checkpoint.
        RunError: the run cannot go on.
    """
    config = set_vocabulary(config, load_manifest(config.data.directory).vocabulary_size)
    layout = check_layout(config, place.world_size)
    topology = build_topology(layout, join(place.rank, place.world_size, place.local_rank))
    Trainer(config, topology, place).run()
    leave_topology()
    leave()


class Trainer:
    """One rank's part in a run."""

    def __init__(self, config: Config, topology: Topology, place: Place) -> None:
        self.config, self.topology, self.place = config, topology, place
        self.data = RunData(config, topology)
        self.chunks = build_chunks(config, topology)
        self.engine = Engine(self.chunks, config, topology)
        self.saver = Saver(config, self.engine, self.data)
        self.step = 0
        self.validation_losses: list[float] = []
        self.flops_per_token = self._model_flops()

    def run(self) -> None:
        """Train to ``train.steps``, from the newest checkpoint of the run's directory if it has one."""
        restored = self.saver.restore()
        if restored is not None:
            self.step = restored[1]
        self._open(restored[0] if restored else None)
        started, first_step = time.perf_counter(), self.step
        if self.step == 0:
            self._evaluate()
        while self.step < self.config.train.steps:
            self._train_step()
            if self._evaluation_is_due():
                self._evaluate()
            if self.saver.is_due(self.step):
                self._save()
        self._save()
        self._close(time.perf_counter() - started, self.step - first_step)
        self.engine.close()

    @property
    def consumed_samples(self) -> int:
        """Samples trained on since the start of the run: the position in the data."""
        return self.step * self.config.train.global_batch_size

    def _train_step(self) -> None:
        started = time.perf_counter()
        result = self.engine.train_step(self.data.training(self.consumed_samples))
        self.step += 1
        if not result.finite:
            raise RunError(
                f"step {self.step} is not finite (loss {result.loss:g}, gradient norm {result.grad_norm:g}): lower "
                f"optimizer.learning_rate={self.config.optimizer.learning_rate:g} or optimizer.clip_grad="
                f"{self.config.optimizer.clip_grad:g}; the same command continues from the newest checkpoint"
            )
        self._record(result, time.perf_counter() - started)

    def _record(self, result: StepResult, seconds: float) -> None:
        train = self.config.train
        batch_tokens = train.global_batch_size * train.sequence_length
        metrics = StepMetrics(
            step=self.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=result.learning_rate,
            tokens=self.step * batch_tokens,
            consumed_samples=self.consumed_samples,
            step_time_s=seconds,
            tokens_per_s=batch_tokens / seconds,
            tflops_per_rank=self.flops_per_token * batch_tokens / seconds / self.topology.layout.world_size / 1e12,
        )
        logger.info("step %d: loss %.6f, grad norm %.4f", metrics.step, metrics.loss, metrics.grad_norm)
        lambdas = self._lambdas() if self.step % LAMBDA_INTERVAL == 0 else {}
        if self.metrics is not None:
            self.metrics.step(metrics)
            self.metrics.lambdas(self.step, lambdas)
        self.console.step(metrics)

    def _evaluation_is_due(self) -> bool:
        interval = self.config.evaluation.interval
        last = self.step == self.config.train.steps
        return interval > 0 and (self.step % interval == 0 or last)

    def _evaluate(self) -> None:
        if self.config.evaluation.interval == 0:
            return
        batches = self.config.evaluation.batches
        count = batches * self.topology.layout.num_microbatches
        loss = self.engine.evaluate(self.data.validation(batches), count)
        self.validation_losses.append(loss)
        if self.metrics is not None:
            self.metrics.evaluation(self.step, self.consumed_samples, loss)
        self.console.say(f"step {self.step}: validation loss {loss:.4f}")

    def _save(self) -> None:
        if self.metrics is not None:
            self.metrics.flush()
        self.saver.save(self.step)

    def _open(self, resumed_from: Path | None) -> None:
        directory, first = self.config.run.directory, self.topology.rank == 0
        parameters = self._stage_parameters()
        self.console = Console(self.config.train.steps, self.step, enabled=first)
        self.metrics: Metrics | None = None
        if first and self.step < self.config.train.steps:
            directory.mkdir(parents=True, exist_ok=True)
            resolved = dump_config(self.config)
            (directory / "config.yaml").write_text(resolved)
            self.metrics = Metrics(directory, resolved, self.step, self.config.train.global_batch_size)
        self.console.say(banner(self.config, self.topology, self.place, parameters, resumed_from))

    def _close(self, seconds: float, steps: int) -> None:
        self.console.close()
        if self.metrics is not None:
            self.metrics.close()
        self.console.say(self._summary(seconds, steps))

    def _summary(self, seconds: float, steps: int) -> str:
        directory, train = self.config.run.directory, self.config.train
        if steps == 0:
            done = f"nothing to do: all {train.steps} steps were done before; raise train.steps to train further"
        else:
            tokens = steps * train.global_batch_size * train.sequence_length
            done = f"{steps} step{'s' if steps > 1 else ''}, {tokens:,} tokens in {duration(seconds)}"
        lines = ["finished: " + done]
        if self.validation_losses:
            ends = [self.validation_losses[0], *self.validation_losses[1:][-1:]]
            lines.append(f"  validation   loss {' -> '.join(f'{loss:.3f}' for loss in ends)} nats per token")
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

    def _model_flops(self) -> float:
        forward = sum(chunk.flops_per_token() for chunk in self.chunks)
        return TRAINING_FLOPS * sum_over_pipeline({0: forward}, 1, self.topology)[0]

    def _lambdas(self) -> dict[int, float]:
        plans = self.chunks[0].plans
        own = {layer: value for chunk in self.chunks for layer, value in chunk.lambdas().items()}
        values = sum_over_pipeline(own, len(plans), self.topology)
        return {plan.index: values[plan.index] for plan in plans if plan.has_lambda}
