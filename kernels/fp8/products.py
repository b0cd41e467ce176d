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

from .formats import E4M3, SCALINGS, Block, Scaling
from .quantise import Operand, dequantise, largest_magnitude, quantise, quantise_blocks

ProductBackend = Literal["emulate", "scaled_mm"]

HARDWARE_UNIT = 16
"""What torch's 8-bit product on a GPU wants every width and the summed length to be a multiple of."""

MICROSCALED = 32
"""Numbers of a block whose scale is e8m0."""

_KINDS = {
    (1, 128): functional.ScalingType.BlockWise1x128,
    (128, 128): functional.ScalingType.BlockWise128x128,
    (1, MICROSCALED): functional.ScalingType.BlockWise1x32,
}
"""What torch calls blocks of a size."""

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
    """Blocks as torch wants them: whole ones, and scales in the layouts that cuBLAS reads."""
    if a.block is None or b.block is None:
        raise ValueError("one operand has blocks and the other has none")
    left, right = _whole_blocks(a), _whole_blocks(b)
    swizzle = functional.SwizzleType.SWIZZLE_32_4_4 if a.block[1] == MICROSCALED else None
    y: Tensor = functional.scaled_mm(
        left.values, right.values.t(), _scale_layout(left), _KINDS[a.block], _scale_layout(right), _KINDS[b.block],
        swizzle_a=swizzle, swizzle_b=swizzle, output_dtype=out_dtype,
    )  # fmt: skip
    return y[: a.values.shape[0], : b.values.shape[0]]


def _whole_blocks(operand: Operand) -> Operand:
    """The operand with zeros, of scale 1, after its rows and columns, to whole blocks and to the hardware's unit."""
    if operand.block is None:
        return operand
    row_unit, columns = max(operand.block[0], HARDWARE_UNIT), -operand.values.shape[1] % operand.block[1]
    values = _filled(operand.values, -operand.values.shape[0] % row_unit, columns)
    missing = values.shape[0] // operand.block[0] - operand.scale.shape[0]
    scale = functional.pad(operand.scale, (0, 0, 0, missing), value=1.0) if missing else operand.scale
    return Operand(values, scale, operand.block)


def _scale_layout(operand: Operand) -> Tensor:
    """The scales of whole blocks in the layout in which torch takes those of this size.

    1 x 128: (R, C / 128), down the columns first. 128 x 128: (C / 128, R / 128) with the first filled up to a multiple
    of 4, down the columns first. 1 x 32: e8m0 in cuBLAS's tiles of 128 rows by 4 blocks, in which the rows r, r + 32,
    r + 64 and r + 96 lie side by side (docs.nvidia.com/cuda/cublas, layout of 1D block scaling factors).
    """
    scale, block = operand.scale, operand.block
    if block == (1, 128):
        return scale.t().contiguous().t()
    filled = functional.pad(scale, (0, -scale.shape[1] % 4), value=1.0)
    if block == (128, 128):
        return filled.t()
    filled = functional.pad(filled, (0, 0, 0, -filled.shape[0] % 128), value=1.0)
    tiles = filled.view(filled.shape[0] // 128, 4, 32, filled.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).to(torch.float8_e8m0fnu)


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

    Torch is asked, once, for the three products of a linear map, and the results are compared with ``emulate``'s: what
    it accepts depends on its version, on CUDA's and on the device, and scales that it reads in another layout must not
    train a model. So the sizes differ from each other, there are several blocks each way, and every block has a
    magnitude of its own.
    """
    try:
        right = all(_agrees(a, b) for a, b in samples(SCALINGS[recipe], device))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None if right else "its results are not those of the recipe"


def samples(scaling: Scaling, device: torch.device) -> Iterator[tuple[Operand, Operand]]:
    """Operands of the forward product, and of those that give the gradients of the input and of the weight."""
    x, w, dy = (_uneven(*sizes, seed).to(device) for seed, sizes in enumerate(((384, 512), (640, 512), (384, 640))))
    yield _sample(x, scaling.rows, E4M3), _sample(w, scaling.weight, E4M3)
    yield _sample(dy, scaling.rows, scaling.gradient), _sample(w.t(), scaling.weight, E4M3)
    yield _sample(dy.t(), scaling.rows, scaling.gradient), _sample(x.t(), scaling.rows, E4M3)


def _sample(x: Tensor, block: Block | None, dtype: torch.dtype) -> Operand:
    return quantise(x, largest_magnitude(x), dtype) if block is None else quantise_blocks(x, block, dtype)


def _uneven(rows: int, columns: int, seed: int) -> Tensor:
    """Normal numbers, times a power of two for each 32 x 32 of them."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-6, 7, (rows // 32, columns // 32), generator=generator).float()
    each = exponents.repeat_interleave(32, dim=0).repeat_interleave(32, dim=1)
    return torch.randn(rows, columns, generator=generator) * torch.exp2(each)


def _agrees(a: Operand, b: Operand) -> bool:
    """Whether every number of torch's product is ``emulate``'s within 1 % of what is summed: the rounding of a bf16
    result, 0.4 %, and of sums that keep fewer bits than fp32."""
    expected = product(a, b, torch.float32, "emulate")
    found = product(a, b, torch.bfloat16, "scaled_mm").float()
    summed = dequantise(a).abs() @ dequantise(b).abs().t()
    return bool(((found - expected).abs() <= 1e-2 * summed).all())
