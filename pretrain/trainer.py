"""The story of a run: set up, resume, train, evaluate, save, stop."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

from ..configs.errors import RunError, UsageError
from ..configs.ramps import StepShape, shape_after
from ..configs.schema import Config
from ..data_pipeline.opening import PreparedData
from ..models.build import build_chunks
from ..parallel.agreement import from_every_rank, largest
from ..parallel.control_store import all_meet, connect
from ..parallel.engines import make_engine
from ..parallel.microbatch import Microbatch
from ..parallel.topology import Topology
from .checkpoints.loading import Found
from .place import Place
from .progress import Progress
from .reporter import Reporter
from .run_data import RunData
from .run_lock import HeldLocks
from .saver import Saver
from .shadow import ShadowCheck
from .stopping import Stop, StopRequests
from .watch.judge import Judge, Judgement
from .watch.pulse import Pulse
from .watch.stragglers import Stragglers

logger = logging.getLogger(__name__)

SLOW_INTERVAL = 10
"""Steps between records of what moves slowly: lambda, of which each record is a small sum over the pipeline, and the
shares of the data's sources."""

EMERGENCY_S = 10.0
"""How long a rank that fails waits for the others to come to the same point, where all could still save."""


class Trainer:
    """One rank's part in a run."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        place: Place,
        prepared: PreparedData,
        *,
        pulse: Pulse | None = None,
        lock: HeldLocks | None = None,
        requests: StopRequests | None = None,
    ) -> None:
        """``lock`` is held by rank 0 alone; ``pulse`` is what a watchdog reads; ``requests`` may stop the run."""
        self.config, self.topology = config, topology
        self.pulse = pulse or Pulse()
        self.data = RunData(config, topology, prepared)
        self.engine = make_engine(build_chunks(config, topology), config, topology)
        self.lock = lock
        self.reporter = Reporter(self.engine, place, self.data)
        self.saver = Saver(config, self.engine, self.reporter.saved, lock.check if lock else lambda: None)
        self.judge = Judge(config.watch)
        self.shadow = ShadowCheck(config.precision.fp8, self.engine)
        self.requests = requests or StopRequests(None, None)
        self.stragglers = Stragglers(config.watch.straggler_ratio, from_every_rank(socket.gethostname(), topology))
        self.progress = Progress()
        self.stop = Stop.NONE
        self._intact = False

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.config.train.steps

    def run(self) -> None:
        """Train to ``train.steps``, from the newest checkpoint of the run's directory if it has one, or until ``stop``.

        After an exception that leaves the model whole on every rank, what has been trained is saved first.
        """
        try:
            self._run()
        except BaseException as error:
            if isinstance(error, Exception):
                self._save_in_emergency(error)
            # A reader may hang in a file system that does not answer, while the other ranks wait for this one to end.
            with suppress(Exception):  # such as those of a full disk, which are not why the run ends
                self.data.close(wait=False)
                self.reporter.close(self.step, f"failed: {error}")
            raise
        self.data.close()
        self.engine.close()

    def _run(self) -> None:
        self._begin()
        started = time.perf_counter()
        if self.step == 0:
            self._evaluate()
        while not self.finished and not self.stop:
            if self._train_step() and self._evaluation_is_due():
                self._evaluate()
            self._agree()
            if self.saver.is_due(self.step):
                self._begin_save()
        self._save_last()
        self._end(time.perf_counter() - started)

    def _begin(self) -> None:
        self.pulse.enter("load", 0)
        found = self.saver.find()
        if found is not None:
            self.data.restore(found.run["data"])
            self.saver.load(found)
            self.judge.restore(found.run["watch"])
            self.progress = Progress(**found.run["progress"])
        productive_s = float(found.run["productive_s"]) if found else 0.0
        self.reporter.open(self.progress, productive_s, found.path if found else None)
        if found is not None and (engine := found.run["config"]["engine"]) != self.config.engine:
            self.reporter.say(
                f"{found.path.name} was saved with engine={engine}: engine={self.config.engine} goes on with its "
                "weights, its optimizer state and its schedule"
            )
        if not self.finished:
            self.data.open_records(self.step)
        self.pulse.step_done(self.step)
        self._intact = True

    def _train_step(self) -> bool:
        """Take a step; whether the run went forward and not back."""
        started, waited = time.perf_counter(), self.data.waited
        shape = shape_after(self.config.train, self.progress.samples)
        self.engine.measures_work = self._work_is_measured()
        loss, grad_norm = self._compute(shape)
        judgement = self.judge.judge(loss, grad_norm)
        skips = judgement.action == "skip"
        if judgement.action in ("roll_back", "stop"):
            self._refuse(judgement, shape)
            return False
        self.pulse.enter("optimizer", self.step + 1)
        self._intact = skips
        learning_rate = self.engine.skip_update() if skips else self.engine.update(grad_norm)
        self.progress = self.progress.after(shape)
        self._intact = True
        if judgement.reason is not None:
            self._note(judgement, shape)
        numbers = {"loss": loss, "grad_norm": grad_norm, "lr": learning_rate}
        seconds, waited = time.perf_counter() - started, self.data.waited - waited
        self.reporter.step(self.progress, shape, numbers, seconds=seconds, waited=waited, skipped=skips)
        self._report_more()
        self.pulse.step_done(self.step)
        return True

    def _compute(self, shape: StepShape) -> tuple[float, float]:
        """Loss and gradient norm of the next step, whose gradients are then in the engine.

        Numbers that are not finite are computed a second time: a fault of the hardware does not repeat itself.
        """
        taken: list[Microbatch] = []
        step, samples = self.step + 1, self.progress.samples
        # Under ``skip`` a step begins with an agreement on what is damaged, for which ranks wait for each other.
        self.pulse.enter("agreement" if self.config.data.on_damage == "skip" else "data", step)
        batches = self.pulse.through(self.data.training(samples, step), "forward and backward", step)
        batches = _noted(batches, taken)
        loss, grad_norm = self.engine.compute_gradients(batches, shape), self.engine.gradient_norm()
        if self.config.watch.rerun_nonfinite and not (math.isfinite(loss) and math.isfinite(grad_norm)):
            before = f"loss {loss:g} and gradient norm {grad_norm:g}"
            self.pulse.enter("forward and backward", step)
            loss, grad_norm = self.engine.compute_gradients(iter(taken), shape), self.engine.gradient_norm()
            if math.isfinite(loss) and math.isfinite(grad_norm):
                logger.warning("step %d gave %s, and computed again finite numbers: suspect a device", step, before)
                self.reporter.event("not reproduced", step, first=before, loss=loss, grad_norm=grad_norm)
        self.shadow.see(step, taken, shape, loss)
        return loss, grad_norm

    def _refuse(self, judgement: Judgement, shape: StepShape) -> None:
        """What a step comes to that neither changes the model nor is passed over."""
        self.pulse.enter("save", self.step)
        self.saver.finish()
        if judgement.action == "roll_back":
            self._go_back(judgement, shape)
            return
        self._intact = False  # these parameters are not worth a checkpoint
        rate, clip = self.config.optimizer.learning_rate, self.config.optimizer.clip_grad
        raise RunError(
            f"step {self.step + 1}: {judgement.reason}: lower optimizer.learning_rate={rate:g} or "
            f"optimizer.clip_grad={clip:g}, or change watch; the same command continues from the newest checkpoint"
        )

    def _go_back(self, judgement: Judgement, shape: StepShape) -> None:
        """Return to the newest checkpoint, and leave out the samples that were read since."""
        self.pulse.enter("load", self.step)
        found = self.saver.find()
        if found is None:
            raise RunError(
                f"step {self.step + 1}: {judgement.reason}, and there is no checkpoint to go back to: lower "
                f"checkpoint.interval={self.config.checkpoint.interval}, or set watch to skip such steps"
            )
        self._intact = False
        left = self._continue_from(found, self.progress.samples + shape.samples)
        self._intact = True
        # In place of the checkpoint: whoever comes back to it must leave out the same samples, and count this time.
        self.pulse.enter("save", self.step)
        self.saver.replace(self.step, self._state())
        logger.warning(
            "step %d: %s: back to %s, and %d samples are left out", left + 1, judgement.reason, found.path.name,
            self.progress.samples - int(found.run["progress"]["samples"]),
        )  # fmt: skip

    def _continue_from(self, found: Found, samples: int) -> int:
        """Load ``found`` and read on at ``samples``; returns the step at which the run was."""
        left, then = self.step, Progress(**found.run["progress"])
        self.saver.load(found)
        self.judge.restore(found.run["watch"], counts=False)
        self.progress = Progress(then.step, samples, then.tokens)
        self.reporter.go_back(then, float(found.run["productive_s"]))
        self.data.go_back(then.step)
        self.reporter.event("went back", left + 1, to=then.step, left_out=[then.samples, samples])
        self.pulse.step_done(then.step)
        return left

    def _note(self, judgement: Judgement, shape: StepShape) -> None:
        what = {"skip": "skipped", "accept": "spike"}[judgement.action]
        first = self.progress.samples - shape.samples
        logger.warning("step %d %s: %s", self.step, what, judgement.reason)
        names = self.data.names(first, shape.samples)
        self.reporter.event(what, self.step, reason=judgement.reason, after_samples=first, samples=names)

    def _work_is_measured(self) -> bool:
        interval = self.config.watch.straggler_interval
        return interval > 0 and (self.step + 1) % interval == 0

    def _report_more(self) -> None:
        self.reporter.record(self.step, self.shadow.values())
        if self.engine.measures_work:
            spread = self.stragglers.see(self.step, from_every_rank(self.engine.own_work_s, self.topology))
            self.reporter.values(self.step, spread.values())
        if self.step % SLOW_INTERVAL == 0:
            self.reporter.slow(self.progress, self.judge.counters())

    def _evaluation_is_due(self) -> bool:
        interval = self.config.evaluation.interval
        return interval > 0 and (self.step % interval == 0 or self.finished)

    def _evaluate(self) -> None:
        if self.config.evaluation.interval == 0:
            return
        count = self.config.evaluation.batches * self.topology.layout.num_microbatches
        batches = self.pulse.through(self.data.validation(self.step), "evaluation", self.step)
        loss = self.engine.evaluate(batches, count)
        self.reporter.evaluation(self.progress, loss)

    def _agree(self) -> None:
        """Let the ranks know of each other's requests to stop, and complete a checkpoint that all have written."""
        self.pulse.enter("agreement", self.step)
        lost = self.lock is not None and self.lock.lost
        stop, busy, lost_anywhere = largest([self.requests.seen(), self.saver.busy, lost], self.topology)
        if lost_anywhere:
            self._intact = False  # what is trained from here on belongs to nobody
            raise RunError(
                f"another run has taken over run.directory={self.config.run.directory}: this one ends without saving, "
                "for it would overwrite what that one writes"
            )
        self.stop = Stop(stop)
        if self.saver.pending and not busy:
            self.saver.finish()

    def _begin_save(self) -> None:
        self.pulse.enter("save", self.step)
        self.reporter.flush()
        self.saver.begin(self.step, self._state())

    def _save_last(self) -> None:
        self.pulse.enter("save", self.step)
        self.reporter.flush()
        self.saver.save_last(self.step, self._state())

    def _save_in_emergency(self, error: Exception) -> None:
        """Save once more if every rank has come to this point with a whole model.

        They do where all fail alike; where one fails alone, the others wait for it in a collective and will not come.
        A lost connection is the end of another rank, which cannot come either.
        """
        lost = isinstance(error, RuntimeError) and not isinstance(error, RunError)
        if lost or isinstance(error, UsageError) or not self._intact:
            return
        with suppress(Exception):
            store = connect()
            place = f"trine/emergency/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{self.step}"
            if store is None or all_meet(store, place, self.topology.layout.world_size, EMERGENCY_S):
                self._save_last()
                logger.warning("the run fails, and step %d was saved before", self.step)

    def _state(self) -> dict[str, object]:
        return {
            "progress": vars(self.progress),
            "data": self.data.state(self.progress.samples),
            "watch": self.judge.state(),
            "productive_s": self.reporter.productive_s,
            "config": self.config.model_dump(mode="json", exclude_none=True),
        }

    def _end(self, seconds: float) -> None:
        how = "finished" if self.finished else f"stopped at step {self.step}, since {self.stop.reason}"
        self.reporter.close(self.step, how)
        self.reporter.summarise(self.progress, seconds, how)


def _noted(batches: Iterator[Microbatch], taken: list[Microbatch]) -> Iterator[Microbatch]:
    for batch in batches:
        taken.append(batch)
        yield batch
