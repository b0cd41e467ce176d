"""How far what a layout computed is from what one process computes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .parity import StepsOfRank
from .parity_pieces import all_versions, whole

TOLERANCES: Mapping[str, float] = {"loss": 1e-5, "grad_norm": 1e-5, "gradient": 1e-4, "parameter": 1e-4}
"""Largest relative differences that adding fp32 numbers in another order explains. A tensor that lacks the part of
one rank, or has it twice, differs by tenths."""

SMALL_GRADIENT = 1e-4
"""A gradient smaller than this part of the norm of all is measured against that part. Such ones, as lambda's at the
start, are small by cancellation: rounding of their terms, not of their sum, is what differs."""


@dataclass(frozen=True)
class Comparison:
    """The largest relative differences from the reference. Infinite where a number or a tensor is not there or not
    finite."""

    loss: float
    """Over the training losses of all steps and the evaluation loss, on every rank."""
    grad_norm: float
    """Over all steps, on every rank."""
    gradient: float
    """Over the first step's reduced gradients: the norm of the difference to that of the reference's tensor, or to
    ``SMALL_GRADIENT`` of all where it is smaller."""
    gradient_name: str
    """The parameter whose gradient differs most."""
    parameter: float
    """Over the parameters after the last step, as for gradients."""
    parameter_name: str
    """The parameter that differs most."""

    @property
    def excess(self) -> tuple[str, ...]:
        """Which of loss, grad_norm, gradient and parameter differ by more than ``TOLERANCES``."""
        return tuple(name for name, limit in TOLERANCES.items() if getattr(self, name) > limit)


def compare(
    reference: StepsOfRank, found: Sequence[StepsOfRank], *, small_gradient: float = SMALL_GRADIENT
) -> Comparison:
    """Compare what the ranks of a layout computed with what one process did, both with the same steps.

    Of a tensor that tensor parallelism replicates *every* tensor rank's copy is compared: one that lacks another
    rank's part of the gradient would drift away from the others unseen.

    ``small_gradient`` stands in for ``SMALL_GRADIENT``; 0 measures every gradient against its own norm alone.

    Raises RunError where the ranks together do not hold a tensor whole.
    """
    losses = [*reference["losses"], reference["evaluation"]]
    least = small_gradient * reference["grad_norms"][0]
    gradient, gradient_name = _worst_tensor(reference, found, "gradients", least)
    parameter, parameter_name = _worst_tensor(reference, found, "parameters", 0.0)
    return Comparison(
        loss=_largest(_numbers(losses, [*rank["losses"], rank["evaluation"]]) for rank in found),
        grad_norm=_largest(_numbers(reference["grad_norms"], rank["grad_norms"]) for rank in found),
        gradient=gradient,
        gradient_name=gradient_name,
        parameter=parameter,
        parameter_name=parameter_name,
    )


def _numbers(expected: Sequence[float], got: Sequence[float]) -> float:
    return _largest(_ratio(abs(ours - theirs), abs(theirs)) for theirs, ours in zip(expected, got, strict=True))


def _worst_tensor(
    reference: StepsOfRank, found: Sequence[StepsOfRank], key: Literal["gradients", "parameters"], least: float
) -> tuple[float, str]:
    expected, got = whole([reference], key), all_versions([rank[key] for rank in found])
    differences = {name: _largest(_tensors(expected, got, name, least)) for name in expected.keys() | got.keys()}
    name = max(sorted(differences), key=lambda name: differences[name])
    return differences[name], name


def _tensors(
    expected: Mapping[str, Tensor], got: Mapping[str, Sequence[Tensor]], name: str, least: float
) -> Iterator[float]:
    """The difference of every version of a tensor, relative to its norm or to ``least``."""
    theirs = expected.get(name)
    for ours in got.get(name, ()):
        if theirs is None or ours.shape != theirs.shape:
            yield math.inf
        else:
            yield _ratio((ours - theirs).norm().item(), max(theirs.norm().item(), least))
    if name not in got:
        yield math.inf


def _ratio(difference: float, size: float) -> float:
    if not math.isfinite(difference):
        return math.inf
    if difference == 0.0:
        return 0.0
    return difference / size if size > 0.0 else math.inf


def _largest(differences: Iterable[float]) -> float:
    return max(differences, default=0.0)
