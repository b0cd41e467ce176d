"""Compiles the retention kernels for the launches below and prints one JSON object per kernel; see test_compiled."""

from __future__ import annotations

import json

import torch
from compiled_kernels import Recorder

from trine.kernels.fused import retention


def run(dk: int, dv: int) -> None:
    """Both passes of one sequence of two gated heads with documents, with the strides of (T, B, H, d)."""
    tensors = (torch.zeros(512, 1, 2, width, dtype=torch.bfloat16) for width in (dk, dk, dv))
    q, k, v = (x.permute(1, 2, 0, 3).requires_grad_() for x in tensors)
    decay, state = torch.zeros(1, 2, 512, requires_grad=True), torch.zeros(1, 2, dk, dv, requires_grad=True)
    resets = torch.zeros(1, 512, dtype=torch.bool)
    output, final = retention.fused_retention(q, k, v, decay, state, resets)
    torch.autograd.backward([output, final], [torch.zeros_like(output), torch.zeros_like(final)])


def main() -> None:
    recorders = {name: Recorder(getattr(retention, name)) for name in ("scan_states", "mix_tokens")}
    for name, recorder in recorders.items():
        setattr(retention, name, recorder)
    for dk, dv in ((64, 128), (256, 512)):
        run(dk, dv)
    for recorder in recorders.values():
        for launch in recorder.launches:
            products = launch.ptx.count("mma")
            print(json.dumps(launch._replace(ptx="")._asdict() | {"products": products}))


if __name__ == "__main__":
    main()
