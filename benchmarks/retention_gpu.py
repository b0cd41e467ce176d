"""What retention.py measures on a GPU, in bf16: trine's kernels beside flash-linear-attention and causal attention."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence

import torch
from harness import Contender, Job, Measure, Row, compare, table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trine.kernels.dispatch import Backend
from trine.kernels.retention import fixed_decay_log, retention

WIDTHS = ((16, 128, 128), (8, 256, 512))
"""Heads, dk and dv: a width of 2,048 in heads as attention has them, and RetNet's at that width."""
TOKENS = 65536
"""Of all sequences together, where one is shorter."""
CROSSOVER = (512, 1024, 2048, 4096)
"""Lengths between which retention is expected to pass attention."""
PEER_CHUNKS = (64, 128, 256)

Core = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""q, k (B, H, T, dk), v (B, H, T, dv) and log-decays (H,) or (B, H, T) -> (B, H, T, dv)."""


def minimal_bytes(tokens: int, heads: int, key: int, value: int) -> float:
    """Bytes of bf16 that a forward and a backward pass must at least read and write.

    Forward q, k, v and the output; backward q, k, v, the output's gradient, and three gradients.
    """
    return float(2 * tokens * heads * ((2 * key + 2 * value) + (4 * key + 3 * value)))


class Inputs:
    """q, k, v, both kinds of decay and the gradient of the output: (B, H, T, d) over memory ordered (B, T, H, d)."""

    def __init__(self, tokens: int, heads: int, key: int, value: int, device: torch.device) -> None:
        generator = torch.Generator(device=device).manual_seed(0)
        self.batch = max(1, TOKENS // tokens)

        def draw(width: int) -> Tensor:
            shape = (self.batch, tokens, heads, width)
            return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).transpose(1, 2)

        self.q, self.k, self.v = draw(key), draw(key).mul_(key**-0.5), draw(value)
        self.upstream = draw(value)
        self.fixed = fixed_decay_log(heads).to(device)
        self.gated = self.fixed[None, :, None].expand(self.batch, -1, tokens).clone().requires_grad_()
        for x in (self.q, self.k, self.v):
            x.requires_grad_()

    def both_passes(self, core: Core, log_decay: Tensor) -> Job:
        """A forward and backward pass of ``core``."""
        trained = [x for x in (self.q, self.k, self.v, log_decay) if x.requires_grad]
        return lambda: torch.autograd.grad(core(self.q, self.k, self.v, log_decay), trained, self.upstream)


def ours(backend: Backend) -> Core:
    """trine's retention."""
    return lambda q, k, v, log_decay: retention(q, k, v, log_decay, backend=backend)[0]


def flash_linear_attention() -> dict[str, Core]:
    """flash-linear-attention's chunk_simple_gla, in its own chunk size and in others if it takes any; {} without it."""
    try:
        function = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    except ImportError:
        return {}

    def core(chunk: int | None) -> Core:
        options = {} if chunk is None else {"chunk_size": chunk}

        def run(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
            fixed = log_decay.dim() == 1
            decay = {"g_gamma": log_decay} if fixed else {"g": log_decay.transpose(1, 2)}
            output: Tensor = function(*(x.transpose(1, 2) for x in (q, k, v)), scale=1.0, **decay, **options)[0]
            return output.transpose(1, 2)

        return run

    if "chunk_size" not in inspect.signature(function).parameters:  # others would be swallowed by its **kwargs
        return {"fla, its own chunk": core(None)}
    return {f"fla, chunk {chunk}": core(chunk) for chunk in PEER_CHUNKS}


def attention_job(tokens: int, batch: int, device: torch.device) -> Job:
    """A forward and backward pass of torch's causal attention of the same width, in 16 heads of 128."""
    generator = torch.Generator(device=device).manual_seed(0)
    shape = (batch, 16, tokens, 128)
    tensors = (torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(4))
    upstream, *trained = tensors
    for x in trained:
        x.requires_grad_()
    return lambda: torch.autograd.grad(scaled_dot_product_attention(*trained, is_causal=True), trained, upstream)


def error(inputs: Inputs, log_decay: Tensor) -> float:
    """Relative error of the gradient of q against the references in fp64, on a few tokens of one sequence."""
    few = [x[:1, :, :512].detach() for x in (inputs.q, inputs.k, inputs.v, inputs.upstream)]
    decay = log_decay.detach()[:1, :, :512] if log_decay.dim() == 3 else log_decay

    def gradient(dtype: torch.dtype, backend: Backend) -> Tensor:
        q, k, v, upstream = (x.to(dtype) for x in few)
        q.requires_grad_()
        given = decay.to(dtype) if dtype == torch.float64 else decay
        return torch.autograd.grad(ours(backend)(q, k, v, given), q, upstream)[0].double()

    exact = gradient(torch.float64, "reference")
    return float((gradient(torch.bfloat16, "triton") - exact).norm() / exact.norm())


def copy_rate(measure: Measure) -> float:
    """Bytes per second, read and written, of copies of 1 GiB; the best of several."""
    source = torch.empty(2**30, dtype=torch.uint8, device=measure.device)
    target = torch.empty_like(source)
    return 2 * 2**30 / min(measure.seconds(lambda: target.copy_(source), 3) for _ in range(7))


def on_gpu(lengths: Sequence[int], measure: Measure, rounds: int) -> dict[str, list[Row]]:
    """All contenders at every width and length, then where retention passes attention."""
    peak, results = copy_rate(measure), {}
    cores = {"trine, Triton": ours("triton"), **flash_linear_attention(), "trine, torch": ours("torch")}
    print(f"copies: {peak / 1e12:.2f} TB/s; {measure.clock}" + ("; fla is not installed" if len(cores) == 2 else ""))
    for heads, key, value in WIDTHS:
        for tokens in lengths:
            inputs = Inputs(tokens, heads, key, value, measure.device)
            moved = minimal_bytes(inputs.batch * tokens, heads, key, value)
            attention = Contender("causal attention", attention_job(tokens, inputs.batch, measure.device))
            for kind, decay in {"fixed decay": inputs.fixed, "data-dependent decay": inputs.gated}.items():
                contenders = [Contender(name, inputs.both_passes(core, decay), moved) for name, core in cores.items()]
                rows = compare([*contenders, attention], measure, rounds=rounds, peak=peak)
                results[f"{key}/{value} {tokens} {kind}"] = rows
                title = f"Retention, {kind}, {inputs.batch} x {tokens} tokens, {heads} heads, {key}/{value}, bf16"
                print(table(title, rows, tokens=inputs.batch * tokens, share="of copy rate"))
                print(f"\nrelative error of dq: {error(inputs, decay):.1e}", flush=True)
    return results | crossover(measure, rounds)


def crossover(measure: Measure, rounds: int) -> dict[str, list[Row]]:
    """Retention in heads of 128 beside attention in the same, at short lengths."""
    heads, key, value = WIDTHS[0]
    results = {}
    for tokens in CROSSOVER:
        inputs = Inputs(tokens, heads, key, value, measure.device)
        contenders = [
            Contender("trine, Triton", inputs.both_passes(ours("triton"), inputs.fixed)),
            Contender("causal attention", attention_job(tokens, inputs.batch, measure.device)),
        ]
        rows = results[f"crossover {tokens}"] = compare(contenders, measure, rounds=rounds, memory=False)
        title = f"Retention and attention, {inputs.batch} x {tokens} tokens, {key}/{value}, bf16"
        print(table(title, rows, tokens=inputs.batch * tokens), flush=True)
    return results
