"""Causal softmax attention, with grouped K,V heads, an optional sliding window and documents kept apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..configs.errors import UsageError
from . import reference
from .dispatch import Backend, resolve
from .tiled import tiled_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    document_start: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Causal softmax(q k^T d^-0.5) v; memory O(T), and with a window work O(T * window).

    q (B, H, Tq, d), k (B, Hkv, Tk, d), v (B, Hkv, Tk, dv) of one dtype -> (B, H, Tq, dv). Query head i uses
    K,V head i // (H / Hkv). The queries are the last Tq of the Tk positions. With ``window`` = C each query
    sees itself and the C - 1 tokens before it. Softmax in fp32 at least.

    ``document_start`` (B, Tq) int64 keeps packed documents apart: for each query the index among the Tk keys
    of the first token of its document, 0 or less where that is the first key or lies before it. A query then
    sees nothing before that key. The starts do not decrease along Tq, and none lies after its own query.
    Raises UsageError for shapes that do not fit.
    """
    _check(q, k, v, window)
    check_document_start(document_start, q)
    length = k.shape[2]
    sees_all = window is None or window >= length
    window = None if sees_all else window
    # torch's fused kernels need equal widths, align the causal mask to the first key instead of the last, and
    # would take the documents as a mask of T^2 elements.
    plain = sees_all and document_start is None and q.shape[2] == length and q.shape[-1] == v.shape[-1]
    implementation = resolve(backend, q.device, fused_refusal(q, k, v))
    if implementation == "reference":
        return reference.attention(q, k, v, window, document_start)
    if plain and backend != "triton":
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    if implementation == "triton":
        from .fused.attention import fused_attention

        return fused_attention(q, k, v, window=window, document_start=document_start)
    return tiled_attention(q, k, v, window=window, document_start=document_start)


def fused_refusal(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], str | None]:
    """What says why the fused kernels do not take these tensors; imported only when it is asked."""

    def reason() -> str | None:
        from .fused.attention import unsupported

        return unsupported(q, k, v)

    return reason


def check_document_start(document_start: Tensor | None, q: Tensor) -> None:
    """Raises UsageError for anything but int64 (B, Tq) or None, for queries ``q`` (B, H, Tq, d)."""
    if document_start is None:
        return
    if document_start.shape != (q.shape[0], q.shape[2]) or document_start.dtype != torch.int64:
        got = f"{document_start.dtype} of shape {tuple(document_start.shape)}"
        raise UsageError(
            f"attention got document_start {got} for q {tuple(q.shape)}; use torch.int64 of shape (B, Tq)"
        )


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> None:
    if k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1] or q.shape[2] > k.shape[2]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise UsageError(
            f"attention got {shapes}; use (B, H, Tq, d), (B, Hkv, Tk, d), (B, Hkv, Tk >= Tq, dv)"
        )
    if q.shape[1] % k.shape[1]:
        raise UsageError(
            f"attention got {q.shape[1]} query heads; use a multiple of {k.shape[1]}, its K,V heads"
        )
    if window is not None and window < 1:
        raise UsageError(f"attention window is {window}; a query sees at least itself, so use 1 or more")
