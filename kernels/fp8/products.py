"""Products of 8-bit operands.

``emulate`` multiplies what the operands stand for in fp32: exact rounding to 8 bits without 8-bit hardware, on any
device, slower than no FP8 at all. ``scaled_mm`` is torch's own product, which on a GPU multiplies 8-bit numbers.

On a CPU ``scaled_mm`` is no speed path either, and equals ``emulate`` bit for bit: torch's portable kernel also
multiplies the scaled operands in fp32. On CPUs with AMX torch would take oneDNN's kernel instead, which sums in another
order and scales afterwards; it is switched off here so that results do not depend on the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .formats import E4M3, SCALINGS, Scaling
from .quantise import Operand, dequantise, largest_magnitude, quantise, quantise_blocks

ProductBackend = Literal["emulate", "scaled_mm"]

HARDWARE_UNIT = 16
"""What torch's 8-bit product on a GPU wants every width and the summed length to be a multiple of."""

_onednn = threading.Lock()


def product(a: Operand, b: Operand, out_dtype: torch.dtype, backend: ProductBackend) -> Tensor:
    """a (M, K) times b (N, K) transposed: (M, N) in ``out_dtype``, bf16 or fp32.

    At most one of the two may be e5m2. Raises RuntimeError where torch has no such product (``refusal`` tells).
    """
    return _PRODUCTS[backend](a, b, out_dtype)


def _emulated(a: Operand, b: Operand, out_dtype: torch.dtype) -> Tensor:
    # The layout of the second operand decides in which order BLAS sums: it is the one that torch's kernel chooses.
    return (dequantise(a) @ dequantise(b).t().contiguous()).to(out_dtype)


def _scaled(a: Operand, b: Operand, out_dtype: torch.dtype) -> Tensor:
    if a.block is not None or b.block is not None:
        return _scaled_blocks(a, b, out_dtype)
    if a.values.device.type == "cpu":
        with _without_onednn():
            return torch._scaled_mm(a.values, b.values.t(), a.scale, b.scale, out_dtype=out_dtype)
    columns = -a.values.shape[1] % HARDWARE_UNIT
    left = _filled(a.values, 0, columns)
    right = _filled(b.values, -b.values.shape[0] % HARDWARE_UNIT, columns)
    return torch._scaled_mm(left, right.t(), a.scale, b.scale, out_dtype=out_dtype)[:, : b.values.shape[0]]


def _filled(values: Tensor, rows: int, columns: int) -> Tensor:
    """``values`` with zeros after its rows and columns: a narrow projection, of one number per head say, needs some."""
    if rows == columns == 0:
        return values
    return functional.pad(values.view(torch.uint8), (0, columns, 0, rows)).view(values.dtype)


def _scaled_blocks(a: Operand, b: Operand, out_dtype: torch.dtype) -> Tensor:
    """Blocks as torch wants them: scales of rows run down the columns first; those of 32 are e8m0."""
    kinds = {(1, 128): functional.ScalingType.BlockWise1x128, (128, 128): functional.ScalingType.BlockWise128x128,
             (1, 32): functional.ScalingType.BlockWise1x32}  # fmt: skip
    if a.block is None or b.block is None:
        raise ValueError("one operand has blocks and the other has none")
    microscaled = a.block[1] == 32
    scales = [
        operand.scale.to(torch.float8_e8m0fnu) if microscaled else operand.scale.t().contiguous().t()
        for operand in (a, b)
    ]
    y: Tensor = functional.scaled_mm(
        a.values, b.values.t(), scales[0], kinds[a.block], scales[1], kinds[b.block], output_dtype=out_dtype
    )
    return y


_PRODUCTS: dict[str, Callable[[Operand, Operand, torch.dtype], Tensor]] = {"emulate": _emulated, "scaled_mm": _scaled}


@contextmanager
def _without_onednn() -> Iterator[None]:
    with _onednn:
        enabled = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(enabled)


@lru_cache(maxsize=16)
def refusal(recipe: str, device: torch.device) -> str | None:
    """Why ``scaled_mm`` cannot serve a recipe on a device, in torch's words; None where it can.

    Torch is asked, once, for products of 128 x 128 x 128 as a linear map and its gradients have them, and the results
    are compared with ``emulate``'s: what it accepts depends on its version, on CUDA's and on the device, and scales
    that it reads in another layout must not train a model.
    """
    try:
        right = all(_agrees(a, b) for a, b in _samples(SCALINGS[recipe], device))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None if right else "its results are not those of the recipe"


def _samples(scaling: Scaling, device: torch.device) -> Iterator[tuple[Operand, Operand]]:
    """Operands of the forward product, and of that with the gradient."""
    x, w = (torch.randn(128, 128, generator=torch.Generator().manual_seed(n)).to(device) for n in (0, 1))
    if scaling.rows is None or scaling.weight is None:
        rows = [quantise(t, largest_magnitude(t), E4M3) for t in (x, w)]
        yield rows[0], rows[1]
        yield quantise(x, largest_magnitude(x), scaling.gradient), rows[1]
        return
    rows = [quantise_blocks(t, scaling.rows, E4M3) for t in (x, w)]
    yield rows[0], quantise_blocks(w, scaling.weight, E4M3)
    yield rows[0], rows[1]


def _agrees(a: Operand, b: Operand) -> bool:
    """Whether torch's product is ``emulate``'s within the rounding of a bf16 result."""
    expected = product(a, b, torch.float32, "emulate")
    found = product(a, b, torch.bfloat16, "scaled_mm").float()
    return bool((found - expected).norm() <= 1e-2 * expected.norm())
