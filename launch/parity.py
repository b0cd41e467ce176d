"""``trine parity``: whether this machine computes the same training steps under every layout of a model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil  # type: ignore[import-untyped]

from ..configs.checks import check_layout
from ..configs.engine_checks import check_engine_is_installed
from ..configs.errors import RunError, UsageError
from ..configs.layouts import NamedLayout, parse_layout, parse_layouts, under_layout
from ..configs.parameters import count_parameters
from ..configs.schema import Config
from ..configs.stack import SharedKVSegment
from ..kernels.cross_entropy import CHUNK_ON_CPU
from ..pretrain.parity import StepsOfRank, parity_config
from ..pretrain.parity_comparison import Comparison, compare
from .machine import usable_memory
from .pool import RankPool

JOB = "trine.pretrain.parity:train"
"""What every rank runs."""

REFERENCE = parse_layout("tp1")

STANDARD = parse_layouts(
    "tp2,tp2+sp,tp4+sp,pp2,pp4,pp2+vpp2,cp2,cp2+a2a,cp4,dp2,tp2+sp+selective,pp2+recompute,tp2+sp+pp2,tp2+cp2,"
    "pp2+cp2,cp2+dp2,tp2+pp2+dp2,tp2+sp+pp2+cp2,"
    "dp2+zero1,dp2+zero2,dp2+zero3,tp2+sp+dp2+zero1,tp2+sp+dp2+zero2,tp2+sp+dp2+zero3"
)
"""Each way of dividing a model alone, then those that meet in large runs together, then DeepSpeed's ZeRO, on up to 8
ranks."""

BYTES_PER_PARAMETER = 16
"""Parameter, gradient and two moments of AdamW in fp32."""

_GIB = 1 << 30


@dataclass(frozen=True)
class Row:
    """What came of one layout."""

    layout: NamedLayout
    verdict: Literal["ok", "FAIL", "refused"]
    comparison: Comparison | None = None
    seconds: float | None = None
    """The start of worker processes included."""
    reason: str | None = None
    """Why there is no comparison, or which differences are too large."""
    trace: str = ""
    """The traceback of a rank that failed by a mistake of the program."""


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    config: Config
    """The model and its training, the layout aside."""
    layouts: tuple[NamedLayout, ...]
    refused: tuple[Row, ...]
    """Layouts of the standard list that this model or this machine cannot take."""
    steps: int
    use_gpus: bool
    leaves_fp8_out: bool
    """Whether the run would multiply in 8 bits, whose rounding depends on the order of sums: parity does not."""


def make_plan(config: Config, names: str | None, *, steps: int, gpus: int) -> Plan:
    """Choose layouts and batch, and refuse what cannot be before anything starts.

    Args:
        names: layouts with commas between them; None for ``STANDARD``.
        gpus: GPUs to run on, one per rank; 0 for the CPU.

    Raises UsageError where the model fits no layout, or not one that ``names`` asks for.
    """
    if steps < 1:
        raise UsageError(f"--steps {steps} compares nothing: use 1 or more")
    asked = STANDARD if names is None else parse_layouts(names)
    _check(config, REFERENCE, gpus)
    layouts: list[NamedLayout] = []
    refused: list[Row] = []
    for layout in asked:
        try:
            _check(config, layout, gpus)
            layouts.append(layout)
        except UsageError as error:
            if names is not None:
                raise UsageError(f"layout {layout.name}: {error}") from None
            refused.append(Row(layout, "refused", reason=str(error)))
    if not layouts:
        raise UsageError(f"no layout of the standard list can be compared; of the first, {refused[0].reason}")
    return Plan(
        parity_config(config, layouts, steps), tuple(layouts), tuple(refused), steps,
        use_gpus=gpus > 0, leaves_fp8_out=config.precision.fp8 is not None,
    )  # fmt: skip


def run_plan(
    plan: Plan, *, seconds: float, on_reference: Callable[[StepsOfRank, float], None], on_row: Callable[[Row], None]
) -> list[Row]:
    """Run the reference and each layout, telling of each when it is done; the refused ones come last.

    A layout whose ranks fail or take longer than ``seconds`` is a row with the verdict FAIL, and the others run.
    Raises RunError where the reference fails or is not finite.
    """
    rows: list[Row] = []
    with RankPool(seconds, use_gpus=plan.use_gpus, quiet=True) as pool:
        started = time.perf_counter()
        reference = _run_reference(pool, plan)
        on_reference(reference, time.perf_counter() - started)
        for layout in plan.layouts:
            rows.append(_run_layout(pool, plan, layout, reference))
            on_row(rows[-1])
    for row in plan.refused:
        rows.append(row)
        on_row(row)
    return rows


def _check(config: Config, layout: NamedLayout, gpus: int) -> None:
    trained = under_layout(parity_config(config, [layout], steps=1), layout)
    check_layout(trained, layout.world_size)
    check_engine_is_installed(trained)
    if gpus:
        _check_gpus(layout, gpus)
    else:
        _check_memory(trained, layout)


def _check_gpus(layout: NamedLayout, gpus: int) -> None:
    if layout.world_size > gpus:
        raise UsageError(
            f"its {layout.world_size} ranks need as many GPUs and this machine has {gpus}: "
            "choose a smaller layout, or --device cpu"
        )


def _check_memory(config: Config, layout: NamedLayout) -> None:
    """Every rank may hold the whole model (data and context ranks do), and the pieces of all meet in one process."""
    states = count_parameters(config.model).total * BYTES_PER_PARAMETER * layout.world_size
    activations = _activations(config) * layout.data * layout.parallel.get("pipeline", 1)
    free = min(psutil.virtual_memory().available, usable_memory())
    if states + activations > free:
        raise UsageError(
            f"its parameters and optimizer take about {states / _GIB:.1f} GiB on {_ranks(layout)} and its activations "
            f"{activations / _GIB:.1f} GiB, and {free / _GIB:.1f} GiB of memory are free: compare a smaller model of "
            f"the same kind by overrides such as {_smaller(config, shorter=activations > states)}"
        )


def _activations(config: Config) -> float:
    """Bytes that one microbatch keeps, roughly: what each layer keeps, and the loss, with a chunk of logits in fp32."""
    model, train = config.model, config.train
    layers = sum(0 if isinstance(segment, SharedKVSegment) else segment.layers for segment in model.stack)
    tokens = train.micro_batch_size * train.sequence_length
    of_layers = tokens * layers * (20 * model.hidden_size + 4 * model.ffn_hidden_size)
    return 4.0 * (of_layers + model.padded_vocabulary() * (min(tokens, CHUNK_ON_CPU) + model.hidden_size))


def _ranks(layout: NamedLayout) -> str:
    return f"{layout.world_size} rank{'s' if layout.world_size > 1 else ''}"


def _smaller(config: Config, *, shorter: bool) -> str:
    """Overrides that make what takes most memory smaller, where they do."""
    model, train = config.model, config.train
    options = []
    if shorter:
        options += [("train.sequence_length", train.sequence_length, 256)]
    for index, segment in enumerate(model.stack):
        if not isinstance(segment, SharedKVSegment):
            options.append((f"model.stack.{index}.layers", segment.layers, 2))
    options.append(("model.vocabulary_size", model.vocabulary_size or 0, 4096))
    useful = [f"{key}={value}" for key, now, value in options if value < now]
    narrow = f"a model.hidden_size and model.ffn_hidden_size below {model.hidden_size} and {model.ffn_hidden_size}"
    return " ".join(useful) or narrow


def _run_reference(pool: RankPool, plan: Plan) -> StepsOfRank:
    try:
        (reference,) = _steps(pool, plan, REFERENCE)
    except RunError as error:
        failure = RunError(
            f"the reference, one process, cannot be computed: {error}; compare a smaller model by overrides, or give "
            "it more time with --timeout"
        )
        for note in getattr(error, "__notes__", ()):
            failure.add_note(note)
        raise failure from error
    if not all(map(math.isfinite, [*reference["losses"], *reference["grad_norms"], reference["evaluation"]])):
        raise RunError("the reference, one process, has a loss or a gradient norm that is not finite")
    return reference


def _run_layout(pool: RankPool, plan: Plan, layout: NamedLayout, reference: StepsOfRank) -> Row:
    started = time.perf_counter()
    try:
        comparison = compare(reference, _steps(pool, plan, layout))
    except (RunError, UsageError) as error:
        trace = "".join(getattr(error, "__notes__", ()))
        return Row(layout, "FAIL", seconds=time.perf_counter() - started, reason=str(error), trace=trace)
    seconds = time.perf_counter() - started
    if comparison.excess:
        return Row(layout, "FAIL", comparison, seconds, f"above tolerance: {', '.join(comparison.excess)}")
    return Row(layout, "ok", comparison, seconds)


def _steps(pool: RankPool, plan: Plan, layout: NamedLayout) -> Sequence[StepsOfRank]:
    config = under_layout(plan.config, layout).model_dump(mode="json", exclude_none=True)
    return pool.run(JOB, layout.world_size, config=config, steps=plan.steps)
