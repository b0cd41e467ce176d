"""Differential attention, the difference of two softmax attentions, in its two published versions."""

from __future__ import annotations

from torch import Tensor

from ..configs.errors import UsageError
from . import reference
from .attention import attention, fused_refusal
from .dispatch import Backend, resolve
from .norm import HeadNorm, apply_head_norm
from .precision import accumulation_dtype
from .shapes import DIFFERENTIAL, DIFFERENTIAL_V2, check_softmax
from .tiled import tiled_attention


def differential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor,
    *,
    window: int | None = None,
    document_start: Tensor | None = None,
    head_norm: HeadNorm | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """(A1 - lam A2) V of each head pair, causal (Differential Transformer, arXiv 2410.05258); memory O(T).

    q (B, 2h, Tq, d) and k (B, 2hkv, Tk, d) hold map s of pair i at head 2i+s; v (B, hkv, Tk, dv) with dv = 2d
    in the paper; lam a 0-dim tensor. Pair i uses K,V pair i // (h / hkv), and A_s = softmax(Q_s K_s^T
    d^-0.5). The queries are the last Tq of the Tk positions; ``window`` and ``document_start`` (B, Tq) are those of
    ``attention``, for both maps. Softmax and subtraction in fp32 at least; returns (B, h, Tq, dv) in q.dtype, to which
    ``head_norm`` is applied where given. Raises UsageError for shapes and dtypes that do not fit, and for empty
    tensors.
    """
    check_softmax(DIFFERENTIAL, q, k, v, window=window, document_start=document_start)
    if lam.dim() != 0:
        raise UsageError(f"differential attention got lam of shape {tuple(lam.shape)}; use a 0-dim tensor")
    _check_head_norm(head_norm, v)
    implementation = resolve(backend, q.device, fused_refusal(q, k, v))
    if implementation == "triton":
        from .fused.attention import fused_attention

        return fused_attention(
            q, k, v, lam=lam, window=window, document_start=document_start, head_norm=head_norm
        )
    if implementation == "reference":
        output = reference.differential_attention(q, k, v, lam, window, document_start)
    else:
        output = tiled_attention(q, k, v, lam=lam, window=window, document_start=document_start)
    return output if head_norm is None else apply_head_norm(output, head_norm)


def differential_attention_v2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor,
    *,
    window: int | None = None,
    document_start: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """a[2i] - lam[i] a[2i+1] of one ordinary grouped attention a (Differential Transformer V2); memory O(T).

    q (B, 2h, Tq, d), k and v (B, hkv, Tk, d), lam (B, h, Tq) after its sigmoid -> (B, h, Tq, d) in q.dtype.
    Both heads of a pair share K and V, so 2h / hkv is even. The queries are the last Tq of the Tk positions;
    ``window`` and ``document_start`` (B, Tq) are those of ``attention``. The subtraction is in fp32 at least. Raises
    UsageError for shapes and dtypes that do not fit, and for empty tensors.
    """
    check_softmax(DIFFERENTIAL_V2, q, k, v, window=window, document_start=document_start)
    if lam.shape != (q.shape[0], q.shape[1] // 2, q.shape[2]):
        raise UsageError(f"differential attention V2 got lam of shape {tuple(lam.shape)}; use (B, h, Tq)")
    if backend == "reference":
        return reference.differential_attention_v2(q, k, v, lam, window, document_start)
    wide = accumulation_dtype(q)
    heads_of_pairs = attention(q, k, v, window=window, document_start=document_start, backend=backend).to(wide)
    first, second = heads_of_pairs[:, 0::2], heads_of_pairs[:, 1::2]
    return first.addcmul(lam.to(wide).unsqueeze(-1), second, value=-1).to(q.dtype)


def _check_head_norm(norm: HeadNorm | None, v: Tensor) -> None:
    if norm is not None and norm.weight is not None and norm.weight.shape != v.shape[3:]:
        raise UsageError(
            f"differential attention got a head norm of shape {tuple(norm.weight.shape)} for values of width "
            f"{v.shape[3]}; use {tuple(v.shape[3:])}"
        )
