"""The backend names, and that each one is obeyed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trine.configs.errors import UsageError
from trine.kernels import reference
from trine.kernels.attention import attention
from trine.kernels.differential import differential_attention, differential_attention_v2
from trine.kernels.dispatch import explain, resolve
from trine.kernels.retention import fixed_decay_log, retention


def test_auto_is_the_fast_path() -> None:
    assert [resolve(b) for b in ("auto", "torch", "reference")] == ["torch", "torch", "reference"]


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(UsageError, match="'cuda' is unknown; use one of auto, reference, torch"):
        resolve("cuda")


def test_the_banner_is_one_line_and_tells_the_backends_apart() -> None:
    lines = {explain(b) for b in ("auto", "torch", "reference")}
    assert len(lines) == 3
    assert all(line and "\n" not in line for line in lines)


def test_the_reference_backend_runs_the_reference(randn: Callable[..., Tensor]) -> None:
    q, k, v, lam = randn(1, 4, 9, 4), randn(1, 2, 9, 4), randn(1, 2, 9, 4), randn(1, 2, 9)
    assert torch.equal(attention(q, k, v, window=3, backend="reference"), reference.attention(q, k, v, 3))
    assert torch.equal(
        differential_attention(q, k, v[:, :1], lam[0, 0, 0], backend="reference"),
        reference.differential_attention(q, k, v[:, :1], lam[0, 0, 0]),
    )
    assert torch.equal(
        differential_attention_v2(q, k, v, lam, backend="reference"),
        reference.differential_attention_v2(q, k, v, lam),
    )
    decay = fixed_decay_log(2)
    for result, expected in zip(
        retention(k, k, v, decay, backend="reference"), reference.retention(k, k, v, decay), strict=True
    ):
        assert torch.equal(result, expected)
