"""Which implementation of a kernel runs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Literal, get_args

import torch

from ..configs.errors import UsageError

Backend = Literal["auto", "reference", "torch", "triton"]
"""``reference``: naive, quadratic memory. ``torch``: in blocks, linear memory. ``triton``: fused, on a GPU. ``auto``:
the fastest that there is for the tensors at hand."""

Implementation = Literal["reference", "torch", "triton"]
"""What a backend resolves to."""


def resolve(
    backend: Backend, device: torch.device, unsupported: Callable[[], str | None] | None = None
) -> Implementation:
    """The implementation that ``backend`` stands for on tensors of ``device``.

    ``unsupported`` says why the fused kernels do not take these tensors; None where there is no fused kernel, and
    then ``triton`` means torch. Raises UsageError for an unknown name, and where ``triton`` cannot be obeyed.
    """
    check(backend, device)
    if backend == "reference":
        return "reference"
    if unsupported is None or backend == "torch" or absent(device) is not None:
        return "torch"
    if backend == "auto" and device.type != "cuda":
        return "torch"  # the interpreter is there to test kernels, not to run them
    reason = unsupported()
    if reason is None:
        return "triton"
    if backend == "triton":
        raise UsageError(f"kernels.backend=triton: {reason}; use auto, which takes torch in such a case")
    return "torch"


def check(backend: Backend, device: torch.device) -> None:
    """Raises UsageError for an unknown name, for ``triton`` where Triton cannot run, and for a bad TRINE_TILES where it
    will run: what a run can know when it starts."""
    if backend not in get_args(Backend):
        raise UsageError(f"kernels.backend {backend!r} is unknown; use one of {', '.join(get_args(Backend))}")
    reason = absent(device)
    if backend == "triton" and reason is not None:
        raise UsageError(f"kernels.backend=triton: {reason}; use auto or torch")
    if backend == "triton" or (backend == "auto" and reason is None and device.type == "cuda"):
        from .fused.tiles import check_tiles

        check_tiles()


def absent(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on ``device``; None where they can, if only in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return "Triton needs a CUDA device"
    return None


def explain(backend: Backend, device: torch.device) -> str:
    """One line for a start-up banner: which kernels run, and why."""
    check(backend, device)
    reason = absent(device)
    if backend == "reference":
        return "naive references, as asked; memory grows with the square of the sequence length"
    if backend == "triton":
        return "triton (fused differential attention, windows, documents and retention), as asked"
    if backend == "torch":
        return "torch (tiled attention, chunkwise retention), as asked; memory linear in the length"
    if reason is None and device.type == "cuda":
        return "triton where it takes the shapes, torch's own attention where that is plainly causal; the fastest here"
    reason = reason or "Triton's interpreter only tests kernels"
    return f"torch (tiled attention, chunkwise retention), since {reason}; memory linear in the length"
