"""Compiles the attention kernels for the launches below and prints one JSON object per kernel; see test_compiled."""

from __future__ import annotations

import json

import torch
from compiled_kernels import Recorder
from torch import Tensor

from trine.kernels.fused import attention
from trine.kernels.norm import HeadNorm

KERNELS = ("attention_forward", "attention_row_sums", "attention_backward_kv", "attention_backward_q")


def tensors(*widths: int, maps: int, group: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k and v of 2 * group heads, one sequence of 1,024 tokens, with the strides of (T, B, H, d)."""
    heads = ((2 * group * maps, widths[0]), (2 * maps, widths[0]), (2, widths[1]))
    return [torch.zeros(1024, 1, *size, dtype=dtype).permute(1, 2, 0, 3).requires_grad_() for size in heads]


def run(q: Tensor, k: Tensor, v: Tensor, **options: object) -> None:
    output = attention.fused_attention(q, k, v, **options)
    output.backward(torch.zeros_like(output))


def main() -> None:
    recorders = {name: Recorder(getattr(attention, name)) for name in KERNELS}
    for name, recorder in recorders.items():
        setattr(attention, name, recorder)
    lam = torch.zeros((), requires_grad=True)
    for d, dv in ((64, 128), (128, 256)):  # as models of 0.8 and of 3 billion parameters have them
        norm = HeadNorm(torch.ones(dv, requires_grad=True), 1e-5, 0.8)
        run(*tensors(d, dv, maps=2, group=1), lam=lam, head_norm=norm)
    starts = torch.zeros(1, 1024, dtype=torch.int64)
    run(*tensors(96, 72, maps=1, group=4), window=1, document_start=starts)
    for recorder in recorders.values():
        for launch in recorder.launches:
            products = launch.ptx.count("mma.sync") + launch.ptx.count("wgmma.mma_async.sync.aligned")
            print(json.dumps(launch._replace(ptx="")._asdict() | {"products": products}))


if __name__ == "__main__":
    main()
