"""Shapes and dtypes that do not fit are refused by every kernel and backend: read on, they would give NaN, numbers from
beyond a tensor, or those of another sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.configs.errors import UsageError
from trine.kernels.attention import attention
from trine.kernels.differential import differential_attention, differential_attention_v2
from trine.kernels.norm import HeadNorm
from trine.kernels.retention import chunk_state, retention

SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "attention": {"q": (2, 4, 5, 8), "k": (2, 2, 6, 8), "v": (2, 2, 6, 16)},
    "window": {"q": (2, 4, 5, 8), "k": (2, 2, 6, 8), "v": (2, 2, 6, 16)},
    "differential": {"q": (2, 4, 5, 8), "k": (2, 2, 6, 8), "v": (2, 1, 6, 16)},
    "differential V2": {"q": (2, 4, 5, 8), "k": (2, 2, 6, 8), "v": (2, 2, 6, 8)},
}
"""Of inputs that fit: two sequences, five queries of six positions."""
BACKENDS = ["torch", "reference", "triton"]
Change = dict[str, Callable[[Tensor], Tensor]]


def call(kernel: str, backend: Any, change: Change) -> Tensor:
    q, k, v = (change.get(name, torch.clone)(torch.ones(size)) for name, size in SIZES[kernel].items())
    if kernel == "differential":
        return differential_attention(q, k, v, torch.tensor(0.5), backend=backend)
    if kernel == "differential V2":
        return differential_attention_v2(q, k, v, torch.ones(2, 2, 5), backend=backend)
    return attention(q, k, v, window=3 if kernel == "window" else None, backend=backend)


CHANGES: dict[str, tuple[Change, str]] = {
    "more queries than keys": ({"k": lambda k: k[:, :, :4], "v": lambda v: v[:, :, :4]}, "Tk >= Tq"),
    "more values than keys": ({"v": lambda v: torch.cat([v, v], 2)}, r"v \(2, ., 12, "),
    "more keys than values": ({"k": lambda k: torch.cat([k, k], 2)}, r"k \(2, ., 12, "),
    "one sequence of keys": ({"k": lambda k: k[:1], "v": lambda v: v[:1]}, r"k \(1, "),
    "one sequence of values": ({"v": lambda v: v[:1]}, r"v \(1, "),
    "wider keys": ({"k": lambda k: torch.cat([k, k], 3)}, r"k \(2, ., 6, 16\)"),
    "no sequences": ({"q": lambda q: q[:0], "k": lambda k: k[:0], "v": lambda v: v[:0]}, "none of them 0"),
    "no queries": ({"q": lambda q: q[:, :, :0]}, "none of them 0"),
    "no heads": ({"q": lambda q: q[:, :0], "k": lambda k: k[:, :0], "v": lambda v: v[:, :0]}, "none of them 0"),
    "values without a width": ({"v": lambda v: v[..., :0]}, "none of them 0"),
    "three dimensions": ({"q": lambda q: q[0]}, r"q \(4, 5, 8\)"),
    "keys of another dtype": ({"k": torch.Tensor.bfloat16}, "torch.float32, torch.bfloat16 and torch.float32; use one"),
    "queries of another dtype": ({"q": torch.Tensor.double}, "torch.float64, torch.float32 and torch.float32; use one"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", SIZES)
@pytest.mark.parametrize("name", CHANGES)
def test_softmax_kernels(name: str, kernel: str, backend: str) -> None:
    change, message = CHANGES[name]
    with pytest.raises(UsageError, match=message):
        call(kernel, backend, change)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("kernel", SIZES)
def test_what_fits_is_taken(kernel: str, backend: str) -> None:
    assert call(kernel, backend, {}).shape[2] == 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [differential_attention, differential_attention_v2])
def test_windows_without_a_token(kernel: Callable[..., Tensor], backend: str) -> None:
    q, kv = torch.ones(1, 2, 5, 8), torch.ones(1, 1, 5, 8)
    k, lam = (q, torch.tensor(0.5)) if kernel is differential_attention else (kv, torch.ones(1, 1, 5))
    with pytest.raises(UsageError, match="window is 0; a query sees at least itself, so use 1 or more"):
        kernel(q, k, kv, lam, window=0, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_norm_of_another_width(backend: Any) -> None:
    x = torch.ones(1, 2, 5, 8)
    norm = HeadNorm(torch.ones(8), 1e-5, 0.8)
    with pytest.raises(UsageError, match=r"a head norm of shape \(8,\) for values of width 16; use \(16,\)"):
        differential_attention(x, x, torch.ones(1, 1, 5, 16), torch.tensor(0.5), head_norm=norm, backend=backend)


RETENTION: dict[str, tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]], str]] = {
    "no tokens": (lambda x, v: (x[:, :, :0], x[:, :, :0], v[:, :, :0]), "none of them 0"),
    "no sequences": (lambda x, v: (x[:0], x[:0], v[:0]), "none of them 0"),
    "keys without a width": (lambda x, v: (x[..., :0], x[..., :0], v), "none of them 0"),
    "three dimensions": (lambda x, v: (x[0], x[0], v[0]), "use .B, H, T, dk. twice"),
    "other dtypes": (lambda x, v: (x, x.bfloat16(), v), "torch.float32, torch.bfloat16 and torch.float32; use one"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RETENTION)
def test_retention(name: str, backend: Any) -> None:
    change, message = RETENTION[name]
    with pytest.raises(UsageError, match=message):
        retention(*change(torch.ones(2, 3, 5, 8), torch.ones(2, 3, 5, 16)), -torch.ones(3), backend=backend)


def test_the_state_of_a_chunk() -> None:
    k, v = torch.ones(2, 3, 5, 8), torch.ones(2, 3, 5, 16)
    for keys, values in ((k[:, :, :0], v[:, :, :0]), (k[:1], v), (k[0], v[0]), (k.double(), v)):
        with pytest.raises(UsageError, match="the state of a chunk got"):
            chunk_state(keys, values, -torch.ones(3))
