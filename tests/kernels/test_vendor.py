"""apex's and Transformer Engine's norms and activations: when they are chosen, and, on a GPU, what they compute.

On a CPU modules with their names and signatures stand in for them, computed by torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm as torch_rms_norm
from torch.nn.functional import silu

from trine.kernels import vendor
from trine.kernels.activation import swiglu
from trine.kernels.norm import rms_norm

Randn = Callable[..., Tensor]
Check = Callable[..., None]
Install = Callable[..., None]

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    """What is installed is asked once a process; here once a test."""
    for question in (vendor.has_apex, vendor.has_transformer_engine):
        question.cache_clear()
    yield
    for question in (vendor.has_apex, vendor.has_transformer_engine):
        question.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put modules into ``sys.modules``: ``install(name={attribute: value})``, or None for one that is missing."""

    def put(modules: dict[str, dict[str, Any] | None]) -> None:
        for name, contents in modules.items():
            if contents is None:
                monkeypatch.setitem(sys.modules, name, None)
                continue
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            module.__dict__.update(contents)
            monkeypatch.setitem(sys.modules, name, module)

    return put


class Called(Exception):
    """Raised by a stand-in that must not be called."""


def forbidden(*_: Any, **__: Any) -> Any:
    raise Called


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: None, quantizer: None, dtype: str, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, None, Tensor]:
    assert x.is_contiguous() and x.dim() == 2 and dtype == str(x.dtype) and not zero_centered
    deviations = (x.square().mean(dim=1) + eps).rsqrt()
    return x * deviations[:, None] * weight, None, deviations


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, deviations: Tensor, weight: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    assert dz.shape == x.shape and dz.is_contiguous()
    normalised, d = x * deviations[:, None], dz * weight
    dx = deviations[:, None] * (d - normalised * (d * normalised).mean(dim=1, keepdim=True))
    return dx, (dz * normalised).sum(dim=0)


def fused_swiglu(x: Tensor, quantizer: None) -> Tensor:
    assert x.is_contiguous()
    activated, linear = x.chunk(2, dim=-1)
    return silu(activated) * linear


def fused_dswiglu(grad: Tensor, x: Tensor, quantizer: None) -> Tensor:
    activated, linear = x.chunk(2, dim=-1)
    sigmoid = activated.sigmoid()
    return torch.cat((grad * linear * sigmoid * (1 + activated * (1 - sigmoid)), grad * silu(activated)), dim=-1)


APEX: dict[str, dict[str, Any]] = {
    "amp_C": {},
    "fused_layer_norm_cuda": {},
    "apex": {},
    "apex.normalization": {},
    "apex.normalization.fused_layer_norm": {
        "fused_rms_norm_affine": lambda x, weight, shape, eps=1e-6: torch_rms_norm(x, shape, weight, eps)
    },
}
ENGINE: dict[str, dict[str, Any]] = {
    "transformer_engine": {},
    "transformer_engine.pytorch": {},
    "transformer_engine.pytorch.constants": {"TE_DType": {t: str(t) for t in (BF16, FP32, FP64)}},
    "transformer_engine_torch": {
        "rmsnorm_fwd": rmsnorm_fwd, "rmsnorm_bwd": rmsnorm_bwd, "swiglu": fused_swiglu, "dswiglu": fused_dswiglu,
    },
}  # fmt: skip
NO_APEX = {"amp_C": None}
NO_ENGINE = {"transformer_engine_torch": None}
FORBIDDEN = {
    "amp_C": {}, "fused_layer_norm_cuda": {},
    "apex.normalization.fused_layer_norm": {"fused_rms_norm_affine": forbidden},
    "transformer_engine_torch": {"rmsnorm_fwd": forbidden, "swiglu": forbidden},
}  # fmt: skip


def halves(joined: Tensor) -> tuple[Tensor, Tensor]:
    first, second = torch.split(joined, joined.shape[-1] // 2, dim=-1)
    return first, second


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (APEX | ENGINE, "apex"),
        (NO_APEX | ENGINE, "Transformer Engine"),
        (APEX | NO_ENGINE, "apex"),
        (NO_APEX | NO_ENGINE, None),
        # The package index has an unrelated package named apex.
        ({"apex": {}} | NO_APEX | NO_ENGINE, None),
        (APEX | {"fused_layer_norm_cuda": None} | NO_ENGINE, None),
    ],
)
def test_whose_norm(install: Install, modules: dict[str, Any], expected: str | None) -> None:
    install({"fused_layer_norm_cuda": None} | modules if modules.get("amp_C", 0) is None else modules)
    for dtype in (BF16, FP32):
        assert vendor.norm_vendor(CUDA, dtype, dtype) == expected
        assert vendor.norm_vendor(CPU, dtype, dtype) is None
    assert vendor.norm_vendor(CUDA, BF16, FP32) is None
    assert vendor.norm_vendor(CUDA, FP64, FP64) is None


def test_a_cpu_never_asks_them(install: Install, randn: Randn) -> None:
    install(FORBIDDEN)
    x, weight = randn(3, 8, dtype=FP32), randn(8, dtype=FP32)
    assert torch.equal(rms_norm(x, weight, 1e-5), torch_rms_norm(x, (8,), weight, 1e-5))
    activated, linear = halves(x)
    assert torch.equal(swiglu(activated, linear), silu(activated) * linear)


@pytest.mark.parametrize("name", ["apex", "Transformer Engine"])
def test_how_a_norm_is_called(install: Install, randn: Randn, assert_same: Check, name: vendor.Vendor) -> None:
    install(APEX | ENGINE)
    inputs = [randn(4, 3, 8), randn(8)]
    assert_same(
        lambda x, weight: vendor.vendor_rms_norm(name, x.mT.contiguous().mT, weight, 1e-5),
        lambda x, weight: torch_rms_norm(x, (8,), weight, 1e-5),
        inputs,
    )


def test_how_swiglu_is_called(install: Install, randn: Randn, assert_same: Check) -> None:
    install(ENGINE)
    assert_same(
        lambda x: vendor.engine_swiglu(*halves(x)), lambda x: silu(halves(x)[0]) * halves(x)[1], [randn(3, 2, 10)]
    )


def test_swiglu_of_kept_tensors_that_were_moved(install: Install, randn: Randn) -> None:
    """Hooks may give back copies, which are side by side no more."""
    install(ENGINE)
    x = randn(3, 2, 10)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda kept: kept):
        out = vendor.engine_swiglu(*halves(x))
    expected = silu(halves(x)[0]) * halves(x)[1]
    for grads in zip(torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), x), strict=True):
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("device", "modules", "expected"),
    [
        (CPU, APEX | ENGINE, "torch, since apex and Transformer Engine need a CUDA device"),
        (CUDA, NO_APEX | NO_ENGINE, "torch, since neither NVIDIA apex nor Transformer Engine is installed"),
        (
            CUDA,
            APEX | NO_ENGINE,
            "RMSNorm of fp32 by apex, of bf16 by torch (its weight is fp32); SwiGLU by torch (apex has none)",
        ),
        (
            CUDA,
            NO_APEX | ENGINE,
            "RMSNorm of fp32 by Transformer Engine, of bf16 by torch (its weight is fp32); SwiGLU by Transformer Engine",
        ),
    ],
)
def test_what_the_banner_says(install: Install, device: torch.device, modules: dict[str, Any], expected: str) -> None:
    install(modules)
    assert vendor.norms_and_activations(device) == expected


def on_gpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` on a GPU, with its results and gradients back here."""
    return lambda *inputs: function(*(x.cuda() for x in inputs)).cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("width", [48, 2048])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("apex", marks=pytest.mark.apex),
        pytest.param("Transformer Engine", marks=pytest.mark.engine),
    ],
)
def test_norm_on_a_gpu(
    randn: Randn, assert_same: Check, name: vendor.Vendor, width: int, dtype: torch.dtype
) -> None:
    assert_same(
        on_gpu(lambda x, weight: vendor.vendor_rms_norm(name, x, weight, 1e-5)),
        lambda x, weight: torch_rms_norm(x, (width,), weight, 1e-5),
        [randn(5, 3, width, dtype=dtype), randn(width, dtype=dtype)],
    )


@pytest.mark.gpu
@pytest.mark.engine
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_swiglu_on_a_gpu(randn: Randn, assert_same: Check, dtype: torch.dtype) -> None:
    assert_same(
        on_gpu(lambda x: vendor.engine_swiglu(*halves(x))),
        lambda x: silu(halves(x)[0]) * halves(x)[1],
        [randn(5, 3, 272, dtype=dtype)],
    )
