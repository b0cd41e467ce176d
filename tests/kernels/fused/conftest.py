"""Where the fused kernels are tested: in Triton's interpreter, or compiled on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

HAS_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _products_of_the_interpreter() -> Iterator[None]:
    """Right products of bf16 in the interpreter; nothing where kernels are compiled."""
    if HAS_GPU:
        yield
        return
    from triton_interpreter import bf16_products

    with bf16_products():
        yield


@pytest.fixture(params=[*([] if HAS_GPU else ["cpu"]), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a case runs: on a machine without a GPU in the interpreter, and, marked ``gpu``, on a GPU.

    A process with a GPU compiles all kernels, so there the cases of the interpreter do not exist.
    """
    return str(request.param)
