"""Which implementation of a kernel runs."""

from __future__ import annotations

from typing import Literal, get_args

from ..configs.errors import UsageError

Backend = Literal["auto", "reference", "torch"]
"""``reference``: naive, quadratic memory. ``torch``: in blocks, linear memory. ``auto``: the fastest."""

Implementation = Literal["reference", "torch"]
"""What a backend resolves to."""


def resolve(backend: Backend) -> Implementation:
    """The implementation that ``backend`` stands for. Raises UsageError for an unknown name."""
    if backend not in get_args(Backend):
        raise UsageError(f"kernel backend {backend!r} is unknown; use one of {', '.join(get_args(Backend))}")
    return "torch" if backend == "auto" else backend


def explain(backend: Backend = "auto") -> str:
    """One line for a start-up banner: which kernels run, and why."""
    if resolve(backend) == "reference":
        return "naive references, as asked; memory grows with the square of the sequence length"
    reason = "the fastest here" if backend == "auto" else "as asked"
    return f"torch (tiled attention, chunkwise retention), {reason}; memory linear in the length"
