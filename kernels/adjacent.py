"""Parts of one tensor that lie side by side in memory: how to make them, and how to see the whole again for nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_parts(like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Uninitialised tensors of the shapes (..., width) and the dtype of ``like``, adjacent."""
    widths = [part.shape[-1] for part in like]
    return torch.split(like[0].new_empty(*like[0].shape[:-1], sum(widths)), widths, dim=-1)


def adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether tensors (..., width) are, in this order, all of one dense (..., sum of the widths)."""
    first = parts[0]
    if first.dim() < 2 or any(part.numel() == 0 for part in parts):
        return False
    strides, offset = _dense_strides(parts), first.storage_offset()
    for part in parts:
        alike = part.shape[:-1] == first.shape[:-1] and part.dtype == first.dtype and part.stride() == strides
        memory = part.untyped_storage().data_ptr(), part.storage_offset()
        if not alike or memory != (first.untyped_storage().data_ptr(), offset):
            return False
        offset += part.shape[-1]
    return True


def joined(parts: Sequence[Tensor]) -> Tensor:
    """(..., sum of the widths) of parts (..., width): a copy only where they are not ``adjacent``."""
    if not adjacent(parts):
        return torch.cat(tuple(parts), dim=-1)
    shape = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))
    return parts[0].as_strided(shape, _dense_strides(parts))


def _dense_strides(parts: Sequence[Tensor]) -> tuple[int, ...]:
    strides, step = [1], sum(part.shape[-1] for part in parts)
    for size in reversed(parts[0].shape[1:-1]):
        strides.append(step)
        step *= size
    return (*reversed([*strides, step]),)
