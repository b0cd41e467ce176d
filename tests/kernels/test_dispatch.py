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
from trine.kernels.dispatch import check, explain, resolve
from trine.kernels.norm import HeadNorm
from trine.kernels.retention import fixed_decay_log, retention

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def takes_all() -> None:
    """No reason against the fused kernels."""


@pytest.fixture
def without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_auto_is_the_fastest_that_takes_the_tensors() -> None:
    assert resolve("auto", CPU, takes_all) == "torch"
    assert resolve("auto", GPU, takes_all) == "triton"
    assert resolve("auto", GPU, lambda: "head widths of 1024") == "torch"
    assert resolve("auto", GPU) == "torch"


def test_names_are_obeyed() -> None:
    assert [resolve(b, GPU, takes_all) for b in ("reference", "torch", "triton")] == ["reference", "torch", "triton"]


def test_triton_is_refused_where_it_cannot_run(without_interpreter: None) -> None:
    with pytest.raises(UsageError, match="backend=triton: Triton needs a CUDA device; use auto or torch"):
        resolve("triton", CPU, takes_all)


def test_triton_is_refused_for_tensors_that_it_does_not_take() -> None:
    with pytest.raises(UsageError, match="backend=triton: head widths of 1024; use auto"):
        resolve("triton", GPU, lambda: "head widths of 1024")


def test_without_triton_there_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve("auto", GPU, takes_all) == "torch"
    assert "since the package triton is not installed" in explain("auto", GPU)
    with pytest.raises(UsageError, match="triton is not installed"):
        resolve("triton", GPU, takes_all)


def test_a_bad_file_of_tiles_is_named_before_a_kernel_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRINE_TILES", "none.json")
    for backend, device in (("auto", GPU), ("triton", GPU), ("triton", CPU)):
        with pytest.raises(UsageError, match=r"TRINE_TILES=none\.json cannot be read"):
            check(backend, device)  # type: ignore[arg-type]
    for backend, device in (("auto", CPU), ("torch", GPU), ("reference", GPU)):
        check(backend, device)  # type: ignore[arg-type]


def test_triton_says_what_does_not_take_a_shape() -> None:
    q, v = torch.ones(1, 2, 3, 264), torch.ones(1, 2, 3, 16)
    with pytest.raises(UsageError) as refused:
        attention(q, q, v, backend="triton")
    assert str(refused.value) == (
        "kernels.backend=triton: the fused kernels take a width d of 8 to 256 in steps of 8, not 264; use auto, which "
        "takes torch in such a case"
    )


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(UsageError, match="'cuda' is unknown; use one of auto, reference, torch, triton"):
        resolve("cuda", CPU)


def test_the_banner_is_one_line_and_tells_the_backends_apart() -> None:
    lines = [explain(b, device) for b in ("auto", "torch", "reference", "triton") for device in (CPU, GPU)]
    assert all(line and "\n" not in line for line in lines)
    assert len(set(lines)) == 5  # only auto depends on the device


def test_the_triton_backend_runs_triton(randn: Callable[..., Tensor]) -> None:
    """In the interpreter where there is no GPU: the dispatch is what is tested here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (randn(1, heads, 19, 16, dtype=torch.float32).detach().to(device) for heads in (4, 2, 2))
    lam, norm = torch.tensor(0.3, device=device), HeadNorm(None, 1e-5, 0.2)
    calls = [
        lambda b: attention(q, k, v, window=5, backend=b),
        lambda b: differential_attention(q, k, v[:, :1], lam, head_norm=norm, backend=b),
        lambda b: differential_attention(q, k, v[:, :1], lam, window=5, head_norm=norm, backend=b),
        lambda b: differential_attention_v2(q, k[:, :1], v[:, :1], lam.expand(1, 2, 19), backend=b),
        lambda b: retention(k, k, v, fixed_decay_log(2).to(device), backend=b)[0],
    ]
    for call in calls:
        fused, expected = call("triton"), call("reference")
        assert not torch.equal(fused, call("torch"))  # other kernels round differently
        assert torch.allclose(fused, expected, atol=1e-5)  # fp32 rounding of sums over 19 keys


def test_the_reference_backend_runs_the_reference(randn: Callable[..., Tensor]) -> None:
    q, k, v, lam = randn(1, 4, 9, 4), randn(1, 2, 9, 4), randn(1, 2, 9, 4), randn(1, 2, 9)
    assert torch.equal(attention(q, k, v, window=3, backend="reference"), reference.attention(q, k, v, 3))
    assert torch.equal(
        differential_attention(q, k, v[:, :1], lam[0, 0, 0], backend="reference"),
        reference.differential_attention(q, k, v[:, :1], lam[0, 0, 0]),
    )
    assert torch.equal(
        differential_attention(q, k, v[:, :1], lam[0, 0, 0], window=3, backend="reference"),
        reference.differential_attention(q, k, v[:, :1], lam[0, 0, 0], 3),
    )
    assert torch.equal(
        differential_attention_v2(q, k, v, lam, window=3, backend="reference"),
        reference.differential_attention_v2(q, k, v, lam, 3),
    )
    decay = fixed_decay_log(2)
    for result, expected in zip(
        retention(k, k, v, decay, backend="reference"), reference.retention(k, k, v, decay), strict=True
    ):
        assert torch.equal(result, expected)
