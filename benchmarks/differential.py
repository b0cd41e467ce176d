"""The differential attention core, forward and backward, beside the formulations that can be installed.

    python benchmarks/differential.py [--tokens 1024 4096] [--dtype bf16] [--json differential.json]

One sequence of 4 head pairs of width 64 with values of 128 (a width of 512); on a GPU 16,384 tokens in all at a width
of 2,048. The peers: the authors' formulation with whole maps, and the ways to get it from scaled_dot_product_attention
(SDPA).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from harness import Contender, Job, Measure, Row, arguments, compare, machine, table, write_json
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from trine.kernels.differential import differential_attention

Formulation = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""q, k (B, 2h, T, d), v (B, h, T, 2d) and lambda -> (B, h, T, 2d)."""

sdpa = partial(scaled_dot_product_attention, is_causal=True)


def whole_maps(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    """The authors' formulation: both T x T maps, their difference, one product."""
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    hidden = torch.full(scores.shape[-2:], -torch.inf, device=q.device, dtype=q.dtype).triu(1)
    maps = torch.softmax(scores + hidden, dim=-1, dtype=torch.float32).to(q.dtype).unflatten(1, (-1, 2))
    return (maps[:, :, 0] - lam.to(q.dtype) * maps[:, :, 1]) @ v


def two_calls(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    """An attention per map, whose values are twice as wide as its keys."""
    first, second = (sdpa(q[:, s::2], k[:, s::2], v) for s in (0, 1))
    return first - lam.to(q.dtype) * second


def two_padded_calls(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    """The same with queries and keys padded to the width of the values."""
    width = q.shape[-1]
    queries, keys = pad(q, (0, width)), pad(k, (0, width))
    first, second = (sdpa(queries[:, s::2], keys[:, s::2], v, scale=width**-0.5) for s in (0, 1))
    return first - lam.to(q.dtype) * second


def four_calls(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    """An attention per map and half of the values."""
    halves = v.chunk(2, dim=-1)
    first, second = (torch.cat([sdpa(q[:, s::2], k[:, s::2], half) for half in halves], dim=-1) for s in (0, 1))
    return first - lam.to(q.dtype) * second


def one_call(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    """All maps and halves as the heads of one attention."""
    halves = torch.stack(v.chunk(2, dim=-1), dim=2).repeat_interleave(2, dim=1)  # (B, 2h, half, T, d)
    queries, keys = (x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2) for x in (q, k))
    heads = sdpa(queries, keys, halves.flatten(1, 2)).unflatten(1, (-1, 2, 2))  # pair, map, half
    both = torch.cat(heads.unbind(3), dim=-1)
    return both[:, :, 0] - lam.to(q.dtype) * both[:, :, 1]


FORMULATIONS: dict[str, Formulation] = {
    "authors' formulation, whole maps": whole_maps,
    "2 x SDPA, values of 2d": two_calls,
    "2 x SDPA, padded to 2d": two_padded_calls,
    "4 x SDPA": four_calls,
    "1 x SDPA of 4h heads": one_call,
}


def operations(tokens: int, pairs: int, width: int) -> float:
    """Multiplications and additions that a forward (6d) and a backward pass (10d) need, for what a causal map sees."""
    return 2.0 * 16 * width * pairs * tokens * (tokens + 1) / 2


def inputs(tokens: int, batch: int, pairs: int, width: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and lambda, and then the gradient of the output."""
    generator = torch.Generator(device=device).manual_seed(0)
    sizes = [(2 * pairs, width), (2 * pairs, width), (pairs, 2 * width), (pairs, 2 * width)]
    tensors = [torch.randn(batch, h, tokens, w, generator=generator, device=device).to(dtype) for h, w in sizes]
    lam = torch.tensor(0.3, device=device)
    return [*(x.requires_grad_() for x in tensors[:3]), lam.requires_grad_(), tensors[3]]


def both_passes(formulation: Formulation, tensors: list[Tensor]) -> Job:
    """A forward and backward pass."""
    *trained, upstream = tensors
    return lambda: torch.autograd.grad(formulation(*trained), trained, upstream)


def forward_pass(formulation: Formulation, tensors: list[Tensor]) -> Job:
    """A forward pass as training makes it, keeping what the backward pass needs."""
    return lambda: formulation(*tensors[:-1])


def on_cpu(lengths: list[int], measure: Measure, rounds: int, dtype: torch.dtype) -> dict[str, list[Row]]:
    """Every formulation, forward and backward, at every length."""
    pairs, width = 4, 64
    peak = measure.matmul_rate(dtype)
    print(f"matrix products of {dtype}: {peak / 1e9:.0f} GFLOP/s; {measure.clock}")
    results = {}
    for tokens in lengths:
        tensors, flops = inputs(tokens, 1, pairs, width, measure.device, dtype), operations(tokens, pairs, width)
        named = {"trine": differential_attention, **FORMULATIONS}
        contenders = [Contender(name, both_passes(f, tensors), flops) for name, f in named.items()]
        rows = results[str(tokens)] = compare(contenders, measure, rounds=rounds, peak=peak)
        title = f"Forward and backward, {tokens} tokens, {pairs} pairs, {width}/{2 * width}, {dtype}"
        print(table(title, rows, tokens=tokens), flush=True)
    return results


def refused(job: Job) -> bool:
    """Whether torch has no such kernel for these tensors, or not the memory."""
    try:
        job()
    except RuntimeError:  # of which running out of a GPU's memory is one
        return True
    return False


def gpu_formulations() -> dict[str, Formulation]:
    """trine's two backends, and the peers under each of SDPA's kernels."""

    def under(backend: SDPBackend, formulation: Formulation) -> Formulation:
        def run(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return formulation(q, k, v, lam)

        return run

    kernels = {
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    named: dict[str, Formulation] = {
        "trine, Triton": partial(differential_attention, backend="triton"),
        "trine, torch": partial(differential_attention, backend="torch"),
    }
    for name, formulation in FORMULATIONS.items():
        if formulation is whole_maps:
            named[name] = formulation
            continue
        named |= {f"{name}, {kernel}": under(backend, formulation) for kernel, backend in kernels.items()}
    return named


def on_gpu(lengths: list[int], measure: Measure, rounds: int) -> dict[str, list[Row]]:
    """Forward alone, and forward and backward, at both widths of the papers; bf16."""
    peak, results = measure.matmul_rate(torch.bfloat16), {}
    print(f"matrix products of bf16: {peak / 1e12:.0f} TFLOP/s; {measure.clock}")
    for width in (64, 128):
        for tokens in lengths:
            batch, pairs = max(1, 16384 // tokens), 2048 // (2 * width)
            tensors = inputs(tokens, batch, pairs, width, measure.device, torch.bfloat16)
            flops = batch * operations(tokens, pairs, width)
            for passes, make, share in (("forward", forward_pass, 6 / 16), ("forward and backward", both_passes, 1.0)):
                jobs = {name: make(f, tensors) for name, f in gpu_formulations().items()}
                absent = [name for name, job in jobs.items() if refused(job)]
                contenders = [Contender(n, job, flops * share) for n, job in jobs.items() if n not in absent]
                rows = results[f"{width} {tokens} {passes}"] = compare(contenders, measure, rounds=rounds, peak=peak)
                title = f"{passes.capitalize()}, {batch} x {tokens} tokens, {pairs} pairs, {width}/{2 * width}, bf16"
                print(table(title, rows, tokens=batch * tokens))
                print("\nrefused:", ", ".join(absent) or "none", flush=True)
    return results


def errors(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Largest relative error of a result of trine's against whole maps in fp64: the output, then each gradient."""
    tensors = inputs(257, 1, 4, 64, device, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    names = ("output", "dq", "dk", "dv", "dlambda")

    def results(formulation: Formulation, x: list[Tensor]) -> list[Tensor]:
        output = formulation(*x[:-1])
        return [output, *torch.autograd.grad(output, x[:-1], x[-1])]

    pairs = zip(results(differential_attention, tensors), results(exact_maps, exact), strict=True)
    errors = (float((a.double() - b).detach().norm() / b.detach().norm()) for a, b in pairs)
    return dict(zip(names, errors, strict=True))


def exact_maps(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    """``whole_maps`` without its rounding of softmax to fp32."""
    hidden = torch.full((q.shape[2], q.shape[2]), -torch.inf, device=q.device, dtype=q.dtype).triu(1)
    maps = (q * q.shape[-1] ** -0.5 @ k.mT + hidden).softmax(dim=-1).unflatten(1, (-1, 2))
    return (maps[:, :, 0] - lam * maps[:, :, 1]) @ v


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths of the sequence")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="by default fp32 on a CPU and bf16 on a GPU")
    options = parser.parse_args()
    device = torch.device(options.device)
    measure, rounds = Measure(device, options.threads), 3 if options.quick else options.rounds
    chosen = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[chosen]
    if device.type == "cuda":
        results = on_gpu(options.tokens or ([4096] if options.quick else [4096, 8192, 16384]), measure, rounds)
    else:
        print("no GPU: this measures the CPU's path; the Triton kernels need one")
        results = on_cpu(options.tokens or ([512] if options.quick else [1024, 4096]), measure, rounds, dtype)
    found = errors(device, dtype)
    print("\nrelative errors of trine's against fp64:", {name: f"{value:.1e}" for name, value in found.items()})
    about = {"command": sys.argv, "machine": machine(device), "clock": measure.clock}
    write_json(options.json, about | {"rows": results, "errors": found})


if __name__ == "__main__":
    main()
