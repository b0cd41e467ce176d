"""8-bit operands: how they are scaled and rounded, and that emulated products are torch's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import scaled_products
import torch
from torch import Tensor

from trine.kernels.fp8 import products
from trine.kernels.fp8.formats import E4M3, E5M2, LARGEST, SCALINGS, Block
from trine.kernels.fp8.products import product, refusal, samples
from trine.kernels.fp8.quantise import Operand, dequantise, largest_magnitude, quantise, quantise_blocks

CPU = torch.device("cpu")
SIZES = [1, 3, 7, 16, 17, 48, 100, 136]
BLOCKS = [(1, 128), (128, 128), (1, 32)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(x: Tensor, dtype: torch.dtype = E4M3) -> Operand:
    return quantise(x, largest_magnitude(x), dtype)


def both(a: Operand, b: Operand, out: torch.dtype) -> tuple[Tensor, Tensor]:
    return product(a, b, out, "emulate"), product(a, b, out, "scaled_mm")


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_emulation_is_torchs_product_bit_for_bit(out: torch.dtype) -> None:
    """All three products of a linear map, at sizes of which none needs to be a multiple of anything."""
    for number, (tokens, inputs, outputs) in enumerate(itertools.product(SIZES, SIZES, SIZES)):
        x, w = whole(3 * randn(tokens, inputs, seed=number)), whole(0.02 * randn(outputs, inputs, seed=number + 1))
        dy = whole(1e-5 * randn(tokens, outputs, seed=number + 2), E5M2)
        for a, b in ((x, w), (dy, w.transposed), (dy.transposed, x.transposed)):
            ours, torchs = both(a, b, out)
            assert torch.equal(ours, torchs), (tokens, inputs, outputs)


@pytest.mark.parametrize("scale", [0.37, 1e-3, 11.7])
def test_emulation_is_torchs_product_under_scales_that_are_no_powers_of_two(scale: float) -> None:
    x, w = whole(randn(17, 100)), whole(randn(31, 100, seed=1))
    a, b = Operand(x.values, torch.tensor(scale)), Operand(w.values, torch.tensor(0.011))
    ours, torchs = both(a, b, torch.float32)
    assert torch.equal(ours, torchs)


def test_a_product_is_near_that_of_the_numbers() -> None:
    """e4m3 rounds by up to 2^-4, 2.6 % in the mean square of evenly spread mantissas; products of two add in squares."""
    x, w = randn(64, 256), randn(48, 256, seed=1)
    expected = x.double() @ w.double().t()
    for a, b in (
        (whole(x), whole(w)),
        *((quantise_blocks(x, (1, k[1]), E4M3), quantise_blocks(w, k, E4M3)) for k in BLOCKS),
    ):
        error = (product(a, b, torch.float32, "emulate") - expected).norm() / expected.norm()
        assert 0.01 < error < 0.05


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("amax", [1.0, 448.0, 449.0, 3e-7, 1e-40, 3e38])
def test_scales_use_the_range_of_the_format(dtype: torch.dtype, amax: float) -> None:
    """The largest number lies in the format's highest two powers of two, or below where 2^-126 is the least scale."""
    operand = whole(torch.tensor([[amax, -amax / 3]]), dtype)
    highest = operand.values.float().abs().max().item()
    assert highest <= LARGEST[dtype]
    assert highest > LARGEST[dtype] / 2.2 or operand.scale == 2.0**-126
    assert math.log2(operand.scale.item()).is_integer()


def test_a_tensor_of_zeros_stays_one() -> None:
    zeros = torch.zeros(20, 40)
    for operand in (whole(zeros), whole(zeros, E5M2), *(quantise_blocks(zeros, k, E4M3) for k in BLOCKS)):
        assert torch.equal(dequantise(operand), zeros)
        assert bool((operand.scale == 1).all())
    assert largest_magnitude(torch.zeros(0, 4)) == 0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("backend", ["emulate", "scaled_mm"])
def test_an_inf_or_nan_makes_every_product_nan(bad: float, backend: str) -> None:
    """Silently saturated, it would be hidden from whoever watches the loss."""
    x = randn(16, 32)
    x[3, 5] = bad
    assert largest_magnitude(x) == math.inf
    y = product(whole(x), whole(randn(16, 32)), torch.float32, backend)  # type: ignore[arg-type]
    assert bool(y.isnan().all())


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_inf_or_nan_spoils_its_block_alone(bad: float) -> None:
    x = randn(3, 256)
    x[1, 130] = bad
    found = dequantise(quantise_blocks(x, (1, 128), E4M3))
    assert bool(found[1, 128:].isnan().all())
    assert bool(found[1, :128].isfinite().all() & found[0].isfinite().all() & found[2].isfinite().all())


def test_what_lies_beyond_the_scale_saturates() -> None:
    """A scale from past steps may be too small for today's numbers."""
    for dtype in (E4M3, E5M2):
        operand = quantise(torch.tensor([[1e3, -1e9, 0.5]]), torch.tensor(1.0), dtype)
        assert operand.values.float().abs().max() == LARGEST[dtype]
        assert bool(operand.values.float().isfinite().all())


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_are_scaled_one_by_one(block: tuple[int, int]) -> None:
    """Each block as if it were alone, cut off at the edges; scales are exact in e8m0, which MXFP8 stores."""
    x = randn(130, 300) * torch.logspace(-6, 6, 300)
    operand = quantise_blocks(x, block, E4M3)
    found, (rows, columns) = dequantise(operand), block
    for row, column in ((0, 0), (129, 299), (128, 128), (5, 288)):
        first = row // rows * rows, column // columns * columns
        part = x[first[0] : first[0] + rows, first[1] : first[1] + columns]
        alone = whole(part)
        assert torch.equal(found[first[0] : first[0] + rows, first[1] : first[1] + columns], dequantise(alone))
    assert torch.equal(operand.scale.to(torch.float8_e8m0fnu).float(), operand.scale)


def test_rounding_is_to_the_nearest_even_number_of_the_format() -> None:
    """Between 16 and 32 e4m3 has steps of 2: 17 and 19 lie in the middle and go to the even mantissa."""
    x = torch.tensor([[448.0, 16.0, 17.0, 19.0, 17.1, 2.0**-9, 2.0**-10]])
    values = whole(x).values.float()
    assert values.tolist() == [[448.0, 16.0, 16.0, 20.0, 18.0, 2.0**-9, 0.0]]


def test_an_operand_with_blocks_is_not_transposed() -> None:
    with pytest.raises(ValueError, match="quantise the transposed tensor"):
        _ = quantise_blocks(randn(4, 4), (1, 32), E4M3).transposed


@pytest.fixture
def forget_refusals() -> Iterator[None]:
    refusal.cache_clear()
    yield
    refusal.cache_clear()


@pytest.mark.parametrize("recipe", SCALINGS)
def test_torch_is_asked_what_it_can_do(recipe: str, forget_refusals: None) -> None:
    """On a CPU torch has products with one scale per tensor and none with blocks."""
    reason = refusal(recipe, CPU)
    assert (reason is None) == (SCALINGS[recipe].rows is None)


def of_blocks(rows: int, columns: int, block: Block, device: str = "cpu") -> Operand:
    """An operand whose neighbouring blocks have other magnitudes."""
    sizes = torch.exp2(8 * randn(-(-rows // 32), -(-columns // 32), seed=1))
    x = randn(rows, columns) * sizes.repeat_interleave(32, 0).repeat_interleave(32, 1)[:rows, :columns]
    operand = quantise_blocks(x, block, E4M3)
    return Operand(operand.values.to(device), operand.scale.to(device), block)


PRODUCTS = {
    "forward": ((384, 512), (640, 512), True),
    "forward with rows of a decay": ((256, 384), (260, 384), True),
    "gradient of the input": ((384, 640), (512, 640), True),
    "gradient of the input, rows of a decay": ((256, 260), (384, 260), True),
    "gradient of the weight": ((640, 384), (512, 384), False),
    "gradient of the weight, rows of a decay": ((260, 256), (384, 256), False),
    "one block": ((128, 128), (128, 128), True),
}
"""Sizes of both operands, and whether the second one is a weight."""


@pytest.mark.parametrize("recipe", ["blockwise", "mxfp8"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_blocks_are_given_to_torch_as_it_reads_them(name: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own rules for shapes, strides and types say what it takes, the stand-in what it would make of it."""
    left, right, weight = PRODUCTS[name]
    scaling = SCALINGS[recipe]
    a, b = of_blocks(*left, scaling.rows), of_blocks(*right, scaling.weight if weight else scaling.rows)  # type: ignore[arg-type]
    shape = product(*(of_blocks(*x.values.shape, x.block, "meta") for x in (a, b)), torch.bfloat16, "scaled_mm").shape  # type: ignore[arg-type]
    assert shape == (left[0], right[0])
    monkeypatch.setattr(products.functional, "scaled_mm", scaled_products.scaled_mm)
    ours, found = both(a, b, torch.bfloat16)
    sizes = dequantise(a).abs() @ dequantise(b).abs().t()
    assert bool(((ours - found).abs() <= 2**-7 * sizes).all())  # bf16's rounding, and sums in another order


@pytest.mark.parametrize("recipe", ["blockwise", "mxfp8"])
def test_scales_that_torch_reads_in_another_layout_are_refused(
    recipe: str, monkeypatch: pytest.MonkeyPatch, forget_refusals: None
) -> None:
    """Of one product of the three alone, too."""
    right = scaled_products.scales

    def otherwise(scale: Tensor, kind: Any, rows: int, columns: int) -> Tensor:
        """Rows first where columns come first, and tiles in the order of their rows."""
        if scale.dim() == 2:
            return right(scale.t().contiguous().view(scale.shape), kind, rows, columns)
        tiles = scale.view(torch.uint8).view(rows // 128, -1, 512).transpose(0, 1)
        return right(tiles.reshape(-1).view(scale.dtype), kind, rows, columns)

    monkeypatch.setattr(products.functional, "scaled_mm", scaled_products.scaled_mm)
    assert refusal(recipe, CPU) is None
    for wrong in (None, *sorted({x.shape for pair in samples(SCALINGS[recipe], CPU) for x in (y.values for y in pair)})):
        refusal.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(
                scaled_products, "scales", lambda *x, wrong=wrong: (otherwise if wrong in (None, x[2:]) else right)(*x)
            )
            assert refusal(recipe, CPU) == "its results are not those of the recipe", wrong


@pytest.mark.gpu
def test_emulation_is_near_a_gpus_product() -> None:
    """Within the rounding of a bf16 result; a GPU sums in another order."""
    device = torch.device("cuda")
    x, w = whole(randn(256, 512).to(device)), whole(randn(120, 512, seed=1).to(device))
    ours, torchs = both(x, w, torch.bfloat16)
    assert (ours.float() - torchs.float()).norm() < 8e-3 * ours.float().norm()
