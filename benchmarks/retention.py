"""The retention core, forward and backward, beside torchscale's and, on a GPU, flash-linear-attention's.

    python benchmarks/retention.py [--tokens 2048 8192 32768] [--threads 2] [--json retention.json]

On a CPU: trine's chunkwise retention, with a fixed and with a data-dependent decay, beside torchscale's unmodified
chunkwise form in its default chunk and in others, and how the time grows with the sequence. On a GPU: the Triton
kernels beside chunk_simple_gla and causal attention.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torchscale_retention
from harness import Contender, Job, Measure, Row, arguments, compare, machine, table, write_json
from torch import Tensor

from trine.kernels.retention import fixed_decay_log, retention

HEADS, KEY, VALUE = 8, 64, 128
"""RetNet's proportions at a width of 512."""
PEER_CHUNKS = (512, 64, 128, 256)
"""The first one is torchscale's default, and the only one in longer sequences than ``ALL_CHUNKS_UP_TO``."""
ALL_CHUNKS_UP_TO = 8192
"""Tokens. The backward pass of torchscale's scan grows with the square of the number of chunks."""


def operations(tokens: int, chunk: int) -> float:
    """Multiplications and additions of a forward and backward pass over whole chunks."""
    forward = 2 * chunk * (KEY + VALUE) + 4 * KEY * VALUE
    backward = 2 * chunk * (3 * KEY + 2 * VALUE) + 8 * KEY * VALUE
    return float(tokens * HEADS * (forward + backward))


class Inputs:
    """q, k, v of one sequence, the decays, and the gradient of the output."""

    def __init__(self, tokens: int, measure: Measure, dtype: torch.dtype) -> None:
        generator = torch.Generator(device=measure.device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=measure.device).to(dtype)

        self.q, self.k, self.v = draw(1, HEADS, tokens, KEY), draw(1, HEADS, tokens, KEY), draw(1, HEADS, tokens, VALUE)
        self.k *= KEY**-0.5
        self.fixed = fixed_decay_log(HEADS).to(measure.device)
        self.gated = self.fixed[None, :, None].expand(1, HEADS, tokens).clone().requires_grad_()
        self.upstream = draw(1, HEADS, tokens, VALUE)
        for x in (self.q, self.k, self.v):
            x.requires_grad_()


def ours(inputs: Inputs, log_decay: Tensor) -> Job:
    """A forward and backward pass of trine's."""
    trained = [x for x in (inputs.q, inputs.k, inputs.v, log_decay) if x.requires_grad]

    def job() -> object:
        output, _ = retention(inputs.q, inputs.k, inputs.v, log_decay)
        return torch.autograd.grad(output, trained, inputs.upstream)

    return job


def torchscale(inputs: Inputs, chunk: int) -> Job:
    """A forward and backward pass of torchscale's, with the values laid out as it wants them."""
    module, positions = torchscale_retention.load(HEADS * KEY, HEADS * VALUE, HEADS)
    values = inputs.v.detach().transpose(1, 2).flatten(2).contiguous().requires_grad_()
    upstream = inputs.upstream.transpose(1, 2).contiguous()

    def job() -> object:
        output = torchscale_retention.chunkwise(module, positions, inputs.q, inputs.k, values, chunk)
        return torch.autograd.grad(output, [inputs.q, inputs.k, values], upstream)

    return job


def on_cpu(lengths: Sequence[int], measure: Measure, rounds: int, dtype: torch.dtype) -> dict[str, list[Row]]:
    """All contenders at every length."""
    peak = measure.matmul_rate(dtype)
    print(f"matrix products of {dtype}: {peak / 1e9:.0f} GFLOP/s; {measure.clock}")
    results = {}
    for tokens in lengths:
        inputs = Inputs(tokens, measure, dtype)
        flops = operations(tokens, 128)
        contenders = [
            Contender("trine, fixed decay", ours(inputs, inputs.fixed), flops),
            Contender("trine, data-dependent decay", ours(inputs, inputs.gated), flops),
            *(
                Contender(_peer(chunk), torchscale(inputs, chunk), operations(tokens, chunk))
                for chunk in PEER_CHUNKS[: None if tokens <= ALL_CHUNKS_UP_TO else 1]
            ),
        ]
        rows = results[str(tokens)] = compare(contenders, measure, rounds=rounds, peak=peak)
        title = f"Retention, forward and backward, {tokens} tokens, {HEADS} heads, {KEY}/{VALUE}, {dtype}"
        print(table(title, rows, tokens=tokens), flush=True)
    return results


def _peer(chunk: int) -> str:
    return f"torchscale, chunk {chunk}" + (" (default)" if chunk == PEER_CHUNKS[0] else "")


def growth(results: dict[str, list[Row]]) -> dict[str, float]:
    """Exponent of the time from the shortest to the longest sequence, by contender."""
    lengths = sorted(results, key=int)
    first, last = ({row.name: row.seconds for row in results[length]} for length in (lengths[0], lengths[-1]))
    factor = math.log(int(lengths[-1]) / int(lengths[0]))
    return {name: math.log(last[name] / first[name]) / factor for name in first.keys() & last.keys()}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths of the sequence")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="by default fp32 on a CPU and bf16 on a GPU")
    options = parser.parse_args()
    device = torch.device(options.device)
    measure = Measure(device, options.threads)
    chosen = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[chosen]
    rounds = 3 if options.quick else options.rounds
    if device.type == "cuda":
        from retention_gpu import on_gpu

        lengths = options.tokens or ([8192] if options.quick else [8192, 16384, 65536])
        results: dict[str, Any] = on_gpu(lengths, measure, rounds)
    else:
        print("no GPU: this measures the CPU's path; the Triton kernels need one")
        lengths = options.tokens or ([512, 2048] if options.quick else [2048, 8192, 32768])
        results = on_cpu(lengths, measure, rounds, dtype)
        if len(lengths) > 1:
            print("\ntime grows with the length to the power of", {k: round(v, 2) for k, v in growth(results).items()})
    write_json(options.json, {"command": sys.argv, "machine": machine(device), "clock": measure.clock, "rows": results})


if __name__ == "__main__":
    main()
