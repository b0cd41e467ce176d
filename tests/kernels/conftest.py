"""How the kernels are compared with their references, and how their memory is watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from largest import LargestTensor
from torch import Tensor

from trine.kernels import tiled

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative errors against fp64: far above the rounding of each format, far below the effect of a mistake."""

Function = Callable[..., Any]


def error(result: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to that of ``expected`` or to elements of 0.1, a tenth of the inputs, at least.

    A gradient that is exactly 0, as of a query that sees one key, is a difference of rounded numbers of their scale.
    """
    difference = (result.detach().double() - expected.detach()).norm()
    least = max(1.0, 0.1 * expected.numel() ** 0.5)
    return float(difference / expected.detach().norm().clamp(min=least))


def run(function: Function, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of a function, and the gradients of its inputs from fixed random gradients of all outputs."""
    results = function(*inputs)
    outputs = list(results) if isinstance(results, tuple) else [results]
    generator = torch.Generator().manual_seed(1)
    # Drawn in bf16, so that the same numbers reach a function and its reference in every dtype.
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.bfloat16).to(o) for o in outputs]
    trained = [x for x in inputs if x.requires_grad]
    return outputs, list(torch.autograd.grad(outputs, trained, upstream))


@pytest.fixture(params=["whole rows", "running softmax"])
def either_tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiled attention with all keys in a tile, as while they are few, and with blocks of them, as in long sequences."""
    if request.param == "running softmax":
        monkeypatch.setattr(tiled, "WHOLE_ROWS", 0)


@pytest.fixture
def randn() -> Callable[..., Tensor]:
    """Normal tensors from a fixed seed, with gradients: ``randn(shape..., dtype=...)``."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return make


@pytest.fixture(scope="session")
def packed() -> Callable[[list[list[int]]], Tensor]:
    """(B, T) int64, the first token of each token's document, from the documents' lengths in each sequence."""

    def make(documents: list[list[int]]) -> Tensor:
        rows = []
        for lengths in documents:
            sizes = torch.tensor(lengths)
            rows.append((sizes.cumsum(0) - sizes).repeat_interleave(sizes))
        return torch.stack(rows)

    return make


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Function, Function, list[Tensor]], None]:
    """Compare outputs and all gradients with those of a reference that runs in fp64 on the same numbers."""

    def check(function: Function, reference: Function, inputs: list[Tensor]) -> None:
        tolerance = TOLERANCES[inputs[0].dtype]
        outputs, grads = run(function, inputs)
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
        expected_outputs, expected_grads = run(reference, exact)
        for name, results, expected in (
            ("output", outputs, expected_outputs),
            ("gradient", grads, expected_grads),
        ):
            for index, (result, target) in enumerate(zip(results, expected, strict=True)):
                assert error(result, target) < tolerance, f"{name} {index}"

    return check


@pytest.fixture
def largest_tensor() -> Callable[[Function, list[Tensor]], int]:
    """Elements of the largest tensor that a forward and backward pass creates."""

    def measure(function: Function, inputs: list[Tensor]) -> int:
        with LargestTensor() as largest:
            run(function, inputs)
        return largest.elements

    return measure
