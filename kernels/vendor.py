"""RMSNorm and SwiGLU of NVIDIA apex and Transformer Engine, where they are installed and keep our numbers.

Written from their sources (apex: apex/normalization/fused_layer_norm.py, csrc/type_shim.h; Transformer Engine 2.x:
pytorch/csrc/extensions/{pybind,normalization,activation}.cpp, pytorch/ops/basic/{rmsnorm,swiglu}.py). They ran nowhere
yet: no GPU was at hand; the cases marked ``gpu`` compare them with torch.

Neither package has a norm of bf16 with a weight in fp32 and a result in bf16: apex's kernels for 16-bit inputs are
compiled for a weight of that type alone, and Transformer Engine's either take both in one type or fp32 inputs. Rounding
the weight would change the model, so a norm in bf16 under our fp32 weights stays torch's.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .adjacent import adjacent, joined

Vendor = Literal["apex", "Transformer Engine"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What both packages take."""


@functools.cache
def has_apex() -> bool:
    """Whether NVIDIA's apex is here with its extensions; an unrelated package of that name has neither of the two."""
    return all(importlib.util.find_spec(name) is not None for name in ("amp_C", "fused_layer_norm_cuda"))


@functools.cache
def has_transformer_engine() -> bool:
    """Whether Transformer Engine is here with its extension for torch."""
    return importlib.util.find_spec("transformer_engine_torch") is not None


def norm_vendor(device: torch.device, dtype: torch.dtype, weight: torch.dtype) -> Vendor | None:
    """Whose RMSNorm takes x and its weight of these types; None for torch's."""
    if device.type != "cuda" or dtype not in DTYPES or weight != dtype:
        return None
    if has_apex():
        return "apex"
    return "Transformer Engine" if has_transformer_engine() else None


def swiglu_vendor(activated: Tensor, linear: Tensor) -> Vendor | None:
    """Whose SwiGLU takes these; None for torch's.

    Transformer Engine wants both side by side in one tensor: as one product gives them. To join others would cost the
    pass over memory that fusing saves.
    """
    if activated.device.type != "cuda" or activated.dtype not in DTYPES or not adjacent((activated, linear)):
        return None
    return "Transformer Engine" if has_transformer_engine() else None


def vendor_rms_norm(vendor: Vendor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, as ``norm.rms_norm``; x and weight of one dtype.

    Statistics in fp32, one rounding at the end, and x itself kept for the backward pass (apex's ``memory_efficient``
    is left off: it keeps the output and divides by the weight, which must then not be 0).
    """
    if vendor == "apex":
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        out: Tensor = fused_rms_norm_affine(x, weight, x.shape[-1:], eps)
        return out
    out = _EngineRMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def engine_swiglu(activated: Tensor, linear: Tensor) -> Tensor:
    """silu(activated) * linear by Transformer Engine, of two tensors that are ``adjacent``.

    The product is taken in fp32 and rounded once, where torch rounds silu first.
    """
    out: Tensor = _EngineSwiglu.apply(activated, linear)  # type: ignore[no-untyped-call]
    return out


def norms_and_activations(device: torch.device) -> str:
    """One line for a start-up banner: whose norms and activations run on ``device``, and why."""
    if device.type != "cuda":
        return "torch, since apex and Transformer Engine need a CUDA device"
    norm = norm_vendor(device, torch.float32, torch.float32)
    if norm is None:
        return "torch, since neither NVIDIA apex nor Transformer Engine is installed"
    norms = f"RMSNorm of fp32 by {norm}, of bf16 by torch (its weight is fp32)"
    swiglu = "Transformer Engine" if has_transformer_engine() else "torch (apex has none)"
    return f"{norms}; SwiGLU by {swiglu}"


def _engine() -> tuple[Any, Any]:
    """Transformer Engine's extension, which its Python package must load first, and its names of dtypes."""
    import transformer_engine.pytorch  # noqa: F401
    import transformer_engine_torch
    from transformer_engine.pytorch.constants import TE_DType

    return transformer_engine_torch, TE_DType


class _EngineRMSNorm(torch.autograd.Function):
    """``vendor_rms_norm`` by Transformer Engine, whose kernels take rows (N, d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        extension, dtypes = _engine()
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        # Output tensor, quantizer, type of the output, multiprocessors left free, whether the weight means 1 + weight.
        options = (None, None, dtypes[x.dtype], 0, False)
        out, _, deviations = extension.rmsnorm_fwd(rows, weight.contiguous(), eps, *options)
        ctx.save_for_backward(rows, deviations, weight)
        return out.view(x.shape)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        extension, _ = _engine()
        rows, deviations, weight = ctx.saved_tensors
        dense = upstream.reshape(rows.shape).contiguous()
        dx, dweight = extension.rmsnorm_bwd(dense, rows, deviations, weight.contiguous(), 0, False)
        return dx.view(upstream.shape), dweight.view(weight.shape), None


class _EngineSwiglu(torch.autograd.Function):
    """``engine_swiglu``; the kernels take rows (N, 2 F), the activated half first."""

    @staticmethod
    def forward(ctx: Any, activated: Tensor, linear: Tensor) -> Tensor:
        extension, _ = _engine()
        ctx.save_for_backward(activated, linear)
        return extension.swiglu(_rows(activated, linear), None).view(activated.shape)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        extension, _ = _engine()
        inputs = _rows(*ctx.saved_tensors)
        dense = upstream.reshape(-1, upstream.shape[-1]).contiguous()
        grads = extension.dswiglu(dense, inputs, None).view(*upstream.shape[:-1], -1)
        first, second = grads.chunk(2, dim=-1)
        return first, second


def _rows(first: Tensor, second: Tensor) -> Tensor:
    """(N, 2 F) of two tensors (..., F), without a copy where they are still adjacent."""
    return joined((first, second)).view(-1, 2 * first.shape[-1])
