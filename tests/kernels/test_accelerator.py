"""The path of devices other than a CPU, followed on the meta device: shapes and dtypes, no numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trine.kernels.differential import differential_attention
from trine.kernels.precision import accumulate_bmm_, operand, wide_bmm
from trine.kernels.retention import chunk_state, retention
from trine.kernels.tiled import tiled_attention


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def check(results: list[Tensor], inputs: list[Tensor]) -> None:
    """The gradients have the shapes and dtypes of the inputs."""
    grads = torch.autograd.grad(results, inputs, [torch.empty_like(r) for r in results])
    assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in inputs]


def test_products_keep_bf16_operands_and_accumulate_in_fp32() -> None:
    a, b = operand(meta(2, 3, 4)), operand(meta(2, 4, 5))
    assert a.dtype == b.dtype == torch.bfloat16
    total = wide_bmm(a, b)
    assert total.dtype == torch.float32
    assert accumulate_bmm_(total, a, b).dtype == torch.float32


@pytest.mark.parametrize("packed", [False, True])
def test_attention(packed: bool) -> None:
    inputs = [meta(2, 6, 700, 8), meta(2, 2, 700, 8), meta(2, 2, 700, 12)]
    starts = torch.empty(2, 700, dtype=torch.int64, device="meta") if packed else None
    output = tiled_attention(*inputs, window=600, document_start=starts)
    assert (output.shape, output.dtype) == ((2, 6, 700, 12), torch.bfloat16)
    check([output], inputs)


def test_differential_attention() -> None:
    inputs = [meta(2, 8, 700, 8), meta(2, 4, 700, 8), meta(2, 2, 700, 16), meta(dtype=torch.float32)]
    output = differential_attention(*inputs)
    assert (output.shape, output.dtype) == ((2, 4, 700, 16), torch.bfloat16)
    check([output], inputs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk_size", [16, 128])
def test_retention(chunk_size: int, packed: bool) -> None:
    q, k, v = meta(2, 3, 70, 8), meta(2, 3, 70, 8), meta(2, 3, 70, 12)
    log_decay, state = meta(2, 3, 70, dtype=torch.float32), meta(2, 3, 8, 12, dtype=torch.float32)
    resets = torch.empty(2, 70, dtype=torch.bool, device="meta") if packed else None
    output, final = retention(
        q, k, v, log_decay, initial_state=state, resets=resets, chunk_size=chunk_size
    )
    assert (output.shape, output.dtype) == ((2, 3, 70, 12), torch.bfloat16)
    assert (final.shape, final.dtype) == ((2, 3, 8, 12), torch.float32)
    check([output, final], [q, k, v, log_decay, state])


def test_chunk_state() -> None:
    k, v, log_decay = meta(2, 3, 70, 8), meta(2, 3, 70, 12), meta(2, 3, 70, dtype=torch.float32)
    state, decay = chunk_state(k, v, log_decay, torch.empty(2, 70, dtype=torch.bool, device="meta"))
    assert (state.shape, state.dtype) == ((2, 3, 8, 12), torch.float32)
    assert (decay.shape, decay.dtype) == ((2, 3), torch.float32)
    check([state, decay], [k, v, log_decay])
