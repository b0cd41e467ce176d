"""What ``trine parity`` prints, and its JSON."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from .. import __version__
from ..configs.parameters import count_parameters
from ..pretrain.parity import DOCUMENTS, OPTIMIZER, StepsOfRank
from ..pretrain.parity_comparison import TOLERANCES
from .parity import Plan, Row

_NUMBERS = ("loss", "grad norm", "gradients", "parameters", "seconds")
_WIDTHS = tuple(max(len(title), 7) for title in _NUMBERS)


def header(plan: Plan, recipe: str) -> str:
    """What is compared, how it is computed, and the titles of the columns."""
    model, train = plan.config.model, plan.config.train
    layers = sum(getattr(segment, "layers", 0) for segment in model.stack)
    documents = f" with {DOCUMENTS} documents in each" if train.document_masking else ""
    without = ", without precision.fp8" if plan.leaves_fp8_out else ""
    rows = {
        "model": f"{recipe}: {layers} layers of width {model.hidden_size}, {count_parameters(model).total:,} "
        f"parameters, vocabulary {model.vocabulary_size}",
        "compute": f"fp32 on {_device(plan)}{without}; whatever the recipe says, AdamW has the constant learning rate "
        f"{OPTIMIZER.learning_rate:g} and eps {OPTIMIZER.eps:g}",
        "batch": f"{train.global_batch_size} windows of {train.sequence_length} random tokens{documents}, the same "
        f"for every layout, in microbatches of {train.micro_batch_size}",
        "compared": f"{plan.steps} step{'s' if plan.steps > 1 else ''} of each layout with one process: largest "
        "relative differences of the losses, the gradient norms,",
        "": "each gradient of the first step and each parameter after the last one",
    }
    lines = [f"trine parity, version {__version__}", *(f"  {name:<10}{text}" for name, text in rows.items())]
    titles = "  ".join(f"{title:>{width}}" for title, width in zip(_NUMBERS, _WIDTHS, strict=True))
    return "\n".join([*lines, f"{'layout':<{_name_width(plan)}} ranks {titles}        worst gradient; worst parameter"])


def reference_line(plan: Plan, reference: StepsOfRank, seconds: float) -> str:
    """The row of the reference, whose loss is told in place of a difference."""
    blank = " " * (sum(_WIDTHS[:4]) + 6)
    losses = " ".join(f"{loss:.4f}" for loss in reference["losses"])
    return f"{'reference':<{_name_width(plan)}} {1:>5} {blank}  {seconds:>{_WIDTHS[4]}.1f}        losses {losses}"


def table_line(plan: Plan, row: Row) -> str:
    """One layout."""
    start = f"{row.layout.name:<{_name_width(plan)}} {row.layout.world_size:>5} "
    found = row.comparison
    numbers = [None] * 4 if found is None else [found.loss, found.grad_norm, found.gradient, found.parameter]
    cells = [f"{'-' if n is None else f'{n:.1e}':>{width}}" for n, width in zip(numbers, _WIDTHS, strict=False)]
    cells.append(f"{'-' if row.seconds is None else f'{row.seconds:.1f}':>{_WIDTHS[4]}}")
    remarks = [] if found is None else [
        name if difference else "equal"
        for name, difference in ((found.gradient_name, found.gradient), (found.parameter_name, found.parameter))
    ]  # fmt: skip
    if row.reason is not None:
        remarks.append(row.reason)
    return f"{start}{'  '.join(cells)}  {'-' if row.verdict == 'refused' else row.verdict:<4}  {'; '.join(remarks)}"


def footer(rows: Sequence[Row]) -> str:
    """The verdict, and the tolerances behind it."""
    agreed, refused = (sum(row.verdict == verdict for row in rows) for verdict in ("ok", "refused"))
    return (
        f"{agreed} of {len(rows) - refused} layouts compute the same as one process within {TOLERANCES['loss']:g} for "
        f"loss, {TOLERANCES['grad_norm']:g} for gradient norm, {TOLERANCES['gradient']:g} for gradients and "
        f"{TOLERANCES['parameter']:g} for parameters" + (f"; {refused} cannot be run here" if refused else "")
    )


def document(plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    """All of it as JSON values; a difference that is not finite is null, as in a row without a comparison."""
    return {
        "config": plan.config.model_dump(mode="json", exclude={"parallel"}, exclude_none=True),
        "versions": {
            "trine": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron-core": version("megatron-core"),
        },
        "device": "gpu" if plan.use_gpus else "cpu",
        "steps": plan.steps,
        "tolerances": dict(TOLERANCES),
        "layouts": [_entry(row) for row in rows],
        "ok": passed(rows),
    }


def passed(rows: Sequence[Row]) -> bool:
    """Whether no layout failed."""
    return all(row.verdict != "FAIL" for row in rows)


def _entry(row: Row) -> dict[str, Any]:
    layout = {"layout": row.layout.name, "ranks": row.layout.world_size, "verdict": row.verdict}
    found = {} if row.comparison is None else asdict(row.comparison)
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in found.items()
    }
    return layout | finite | {"seconds": row.seconds, "reason": row.reason}


def _device(plan: Plan) -> str:
    return "this machine's GPUs with NCCL" if plan.use_gpus else "this machine's CPU with gloo"


def _name_width(plan: Plan) -> int:
    names = [layout.name for layout in (*plan.layouts, *(row.layout for row in plan.refused))]
    return max(map(len, ["reference", *names]))
