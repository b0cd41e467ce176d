"""Linear maps with 8-bit operands beside bf16: the product alone, and forward and backward with quantisation.

Without a GPU nothing here is a measure of speed: emulated products are compared with torch's bit for bit, and timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness import Contender, Job, Measure, Row, arguments, compare, machine, table, write_json
from torch import Tensor

from trine.kernels.fp8.formats import E4M3, E5M2
from trine.kernels.fp8.products import ProductBackend, product
from trine.kernels.fp8.quantise import Operand, largest_magnitude, quantise

Shape = tuple[int, int, int]
"""Tokens M, inputs K, outputs N."""


@dataclass(frozen=True)
class Tensors:
    """What a linear map is given."""

    x: Tensor
    w: Tensor
    dy: Tensor

    @staticmethod
    def make(shape: Shape, device: torch.device, dtype: torch.dtype) -> Tensors:
        """Normal numbers from a fixed seed, as large as in a network at its start."""
        generator = torch.Generator().manual_seed(0)
        tokens, inputs, outputs = shape
        sizes = ((tokens, inputs, 1.0), (outputs, inputs, inputs**-0.5), (tokens, outputs, 1e-4))
        drawn = [scale * torch.randn(rows, columns, generator=generator) for rows, columns, scale in sizes]
        return Tensors(*(x.to(device, dtype) for x in drawn))


def whole(x: Tensor, dtype: torch.dtype = E4M3) -> Operand:
    """x under one scale from its own magnitude, the tensorwise recipe."""
    return quantise(x, largest_magnitude(x), dtype)


def tensorwise(tensors: Tensors, backend: ProductBackend) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """y, dx and dW with every operand quantised, as one microbatch of a step with a single one."""
    out = tensors.x.dtype

    def job() -> tuple[Tensor, Tensor, Tensor]:
        x, w, dy = whole(tensors.x), whole(tensors.w), whole(tensors.dy, E5M2)
        return (
            product(x, w, out, backend),
            product(dy, w.transposed, out, backend),
            product(dy.transposed, x.transposed, out, backend),
        )

    return job


def plain(tensors: Tensors) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """The same in the type of the tensors."""
    return lambda: (tensors.x @ tensors.w.t(), tensors.dy @ tensors.w, tensors.dy.t() @ tensors.x)


def rowwise(tensors: Tensors) -> Job:
    """torch's product with a scale for each token and each output: the peer of one scale per tensor."""

    def by_row(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / 448
        return (x.float() / scale).to(E4M3), scale

    (x, x_scale), (w, w_scale) = by_row(tensors.x), by_row(tensors.w)
    return lambda: torch._scaled_mm(x, w.t(), x_scale, w_scale.t(), out_dtype=torch.bfloat16)


def errors(found: Sequence[Tensor], tensors: Tensors) -> list[float]:
    """Relative to products of the same numbers in fp64: y, dx, dW."""
    exact = plain(Tensors(tensors.x.double(), tensors.w.double(), tensors.dy.double()))()
    return [float((ours.double() - true).norm() / true.norm()) for ours, true in zip(found, exact, strict=True)]


def on_gpu(shapes: Sequence[Shape], measure: Measure, rounds: int) -> dict[str, Any]:
    """Times, operations per second and errors of every shape."""
    results: dict[str, Any] = {}
    for shape in shapes:
        tensors = Tensors.make(shape, measure.device, torch.bfloat16)
        operations = 2.0 * shape[0] * shape[1] * shape[2]
        x, w = whole(tensors.x), whole(tensors.w)
        raw = [
            Contender("bf16 product", lambda t=tensors: t.x @ t.w.t(), operations),  # type: ignore[misc]
            Contender("tensorwise product", lambda a=x, b=w: product(a, b, torch.bfloat16, "scaled_mm"), operations),  # type: ignore[misc]
            Contender("rowwise product", rowwise(tensors), operations),
        ]
        full = [
            Contender("bf16, forward and backward", plain(tensors), 3 * operations),
            Contender("tensorwise with quantisation", tensorwise(tensors, "scaled_mm"), 3 * operations),
        ]
        name = "M {} K {} N {}".format(*shape)
        rows = [row for group in (raw, full) for row in compare(group, measure, rounds=rounds)]
        rates = _rates(rows, [*raw, *full])
        eight_bit = errors(tensorwise(tensors, "scaled_mm")(), tensors)
        wrong = {"bf16": errors(plain(tensors)(), tensors), "tensorwise": eight_bit}
        print(table(name, rows))
        print("\nTFLOP/s: " + ", ".join(f"{one} {rate:.0f}" for one, rate in rates.items()))
        print("error of y, dx, dW against fp64: " + _listed(wrong))
        results[name] = {"rows": rows, "tflops": rates, "errors": wrong}
    return results


def on_cpu(shapes: Sequence[Shape], measure: Measure, rounds: int) -> dict[str, Any]:
    """Whether emulated products are torch's, and what emulation costs."""
    equal = sum(_equal(shape) for shape in itertools.product((16, 48, 136), repeat=3))
    print(f"emulate equals torch._scaled_mm bit for bit in y, dx and dW: {equal} of 27 shapes")
    results: dict[str, Any] = {"bit_equal_shapes": equal, "of_shapes": 27}
    for shape in shapes:
        tensors = Tensors.make(shape, measure.device, torch.float32)
        contenders = [
            Contender("fp32, forward and backward", plain(tensors)),
            Contender("emulate, with quantisation", tensorwise(tensors, "emulate")),
            Contender("scaled_mm on a CPU, with quantisation", tensorwise(tensors, "scaled_mm")),
        ]
        name = "M {} K {} N {}: no speed path".format(*shape)
        rows = compare(contenders, measure, rounds=rounds)
        eight_bit = errors(tensorwise(tensors, "emulate")(), tensors)
        wrong = {"fp32": errors(plain(tensors)(), tensors), "tensorwise": eight_bit}
        print(table(name, rows))
        print("\nerror of y, dx, dW against fp64: " + _listed(wrong))
        results[name] = {"rows": rows, "errors": wrong}
    return results


def _equal(shape: Shape) -> bool:
    tensors = Tensors.make(shape, torch.device("cpu"), torch.float32)
    pairs = zip(tensorwise(tensors, "emulate")(), tensorwise(tensors, "scaled_mm")(), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


def _rates(rows: Sequence[Row], contenders: Sequence[Contender]) -> dict[str, float]:
    return {row.name: one.flops / row.seconds / 1e12 for row, one in zip(rows, contenders, strict=True)}


def _listed(errors_of: dict[str, list[float]]) -> str:
    return "; ".join(f"{name} {', '.join(f'{e:.1e}' for e in values)}" for name, values in errors_of.items())


def main() -> None:
    """Measure and print."""
    options = arguments("Linear maps with 8-bit operands beside bf16.").parse_args()
    device = torch.device(options.device)
    measure, rounds = Measure(device, options.threads), 3 if options.quick else options.rounds
    if device.type == "cuda":
        sizes = (4096, 8192) if options.quick else (2048, 4096, 8192)
        shapes = [(n, n, n) for n in sizes] if options.quick else list(itertools.product(sizes, repeat=3))
        results = on_gpu(shapes, measure, rounds)
    else:
        print("no GPU: this shows that emulation rounds as torch does and what it costs, and nothing about FP8's speed")
        results = on_cpu([(512, 512, 512)] if options.quick else [(512, 512, 512), (1024, 1024, 1024)], measure, rounds)
    write_json(options.json, {"machine": machine(device), "clock": measure.clock, "results": results})


if __name__ == "__main__":
    main()
