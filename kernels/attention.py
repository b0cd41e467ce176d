"""Causal softmax attention, with grouped K,V heads and an optional sliding window."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..configs.errors import UsageError
from . import reference
from .dispatch import Backend, resolve
from .tiled import tiled_attention


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, backend: Backend = "auto"
) -> Tensor:
    """Causal softmax(q k^T d^-0.5) v; memory O(T), and with a window work O(T * window).

    q (B, H, Tq, d), k (B, Hkv, Tk, d), v (B, Hkv, Tk, dv) of one dtype -> (B, H, Tq, dv). Query head i uses
    K,V head i // (H / Hkv). The queries are the last Tq of the Tk positions. With ``window`` = C each query
    sees itself and the C - 1 tokens before it. Softmax in fp32 at least. Raises UsageError for shapes that do
    not fit.
    """
    _check(q, k, v, window)
    if resolve(backend) == "reference":
        return reference.attention(q, k, v, window)
    length = k.shape[2]
    sees_all = window is None or window >= length
    # torch's fused kernels need equal widths, and align the causal mask to the first key instead of the last.
    if sees_all and q.shape[2] == length and q.shape[-1] == v.shape[-1]:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return tiled_attention(q, k, v, window=None if sees_all else window)


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
