"""Whether what a softmax kernel is given fits together, whatever computes it: a kernel that reads on gives NaN, numbers
from beyond a tensor, or those of another sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..configs.errors import UsageError


class Heads(NamedTuple):
    """How many heads q, k and v of an operation have: per value head, ``keys``, and a multiple of ``queries``."""

    operation: str
    queries: int
    keys: int
    wanted: str


ATTENTION = Heads("attention", 1, 1, "H, Hkv and Hkv with H a multiple of Hkv")
DIFFERENTIAL = Heads("differential attention", 2, 2, "2h, 2hkv and hkv with h a multiple of hkv")
DIFFERENTIAL_V2 = Heads("differential attention V2", 2, 1, "2h, hkv and hkv with h a multiple of hkv")


def check_softmax(
    heads: Heads, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, document_start: Tensor | None
) -> None:
    """Raises UsageError unless q (B, ., Tq, d), k (B, ., Tk, d), v (B, ., Tk, dv) of one dtype, Tq <= Tk, have these
    heads, none is empty, a window holds a token, and ``document_start`` is int64 (B, Tq) or None."""
    operation = heads.operation
    if not _fit(q, k, v):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise UsageError(
            f"{operation} got {shapes}; use (B, heads, Tq, d), (B, heads, Tk, d) and (B, heads, Tk >= Tq, dv), none of "
            "them 0"
        )
    check_one_dtype(operation, q, k, v)
    if k.shape[1] != heads.keys * v.shape[1] or q.shape[1] % (heads.queries * v.shape[1]):
        counts = f"{q.shape[1]} query, {k.shape[1]} key and {v.shape[1]} value heads"
        raise UsageError(f"{operation} got {counts}; use {heads.wanted}")
    if window is not None and window < 1:
        raise UsageError(f"{operation} window is {window}; a query sees at least itself, so use 1 or more")
    _check_document_start(operation, document_start, q)


def check_one_dtype(operation: str, *tensors: Tensor) -> None:
    """Raises UsageError for ``tensors`` of several dtypes."""
    first, *others = tensors
    if any(x.dtype != first.dtype for x in others):
        *kinds, last = (str(x.dtype) for x in tensors)
        raise UsageError(f"{operation} got {', '.join(kinds)} and {last}; use one dtype")


def _fit(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if not q.dim() == k.dim() == v.dim() == 4 or 0 in (*q.shape, *k.shape, *v.shape):
        return False
    one_batch = q.shape[0] == k.shape[0] == v.shape[0]
    return one_batch and q.shape[2] <= k.shape[2] == v.shape[2] and q.shape[3] == k.shape[3]


def _check_document_start(operation: str, document_start: Tensor | None, q: Tensor) -> None:
    if document_start is None:
        return
    if document_start.shape != (q.shape[0], q.shape[2]) or document_start.dtype != torch.int64:
        got = f"{document_start.dtype} of shape {tuple(document_start.shape)}"
        raise UsageError(
            f"{operation} got document_start {got} for q {tuple(q.shape)}; use torch.int64 of shape (B, Tq)"
        )
