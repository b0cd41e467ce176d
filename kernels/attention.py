"""Causal softmax attention, with grouped K,V heads, an optional sliding window and documents kept apart."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import reference
from .dispatch import Backend, resolve
from .shapes import ATTENTION, check_softmax
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
    Raises UsageError for shapes and dtypes that do not fit, and for empty tensors.
    """
    check_softmax(ATTENTION, q, k, v, window=window, document_start=document_start)
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
