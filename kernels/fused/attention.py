"""Softmax attention and the difference of two, forward and backward, in Triton: the contract of ``tiled``, on a GPU.

Scores never leave a multiprocessor, and memory is linear in the sequence. Two maps over the same values go through as
one attention: forward K and V are read once, and backward dV takes one product and dP = dO V^T is shared. Per element
of a pair of maps (d, dv = 2d) that is 6 d multiplications forward and 14 d backward, where two calls of a kernel for
one map need 6 d and 20 d when organised alike. One backward kernel with atomic additions to dQ would need 10 d: it was
not chosen, because its sums would differ between runs by rounding (``jit.attention_backward``).

Saved for the backward pass: the inputs, the output (before the norm, if one is fused), the second map's output, and one
fp32 log-sum-exp per query and map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..norm import HeadNorm
from .jit.attention_backward import attention_backward_kv, attention_backward_q, attention_row_sums
from .jit.attention_forward import attention_forward
from .launching import device_of
from .tiles import Tiles, padded, tiles

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 256
MAX_VALUE_WIDTH = 512
_SUMS_BLOCK = 8192
"""Elements of a block of ``attention_row_sums``, which keeps three or four such blocks in registers."""


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why these kernels do not take q, k and v, as a sentence that others end; None where they do.

    They take bf16, fp16 and fp32, d up to 256 and dv up to 512 in multiples of 8. Devices are not looked at.
    """
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        kinds = ", ".join(dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in (q, k, v)))
        return f"the fused kernels take bfloat16, float16 or float32, one for q, k and v, not {kinds}"
    for name, width, most in (("d", q.shape[-1], MAX_WIDTH), ("dv", v.shape[-1], MAX_VALUE_WIDTH)):
        if width % 8 or not 0 < width <= most:
            return f"the fused kernels take a width {name} of 8 to {most} in steps of 8, not {width}"
    if 0 in (*q.shape, *k.shape, *v.shape):
        return "the fused kernels take no empty tensors"
    return None


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lam: Tensor | None = None,
    window: int | None = None,
    document_start: Tensor | None = None,
    head_norm: HeadNorm | None = None,
) -> Tensor:
    """Causal softmax(q k^T d^-0.5) v, or (A1 - lam A2) v with two maps per value head; memory O(T).

    q (B, G*group*maps, Tq, d), k (B, G*maps, Tk, d), v (B, G, Tk, dv) on one GPU, any strides, for which
    ``unsupported`` is None; with the 0-dim ``lam`` maps is 2, and map s of pair i is at head 2i+s. The queries are the
    last Tq of the Tk positions; with ``window`` = C each sees itself and the C - 1 tokens before it.
    ``document_start`` (B, Tq) int64 as for ``attention.attention``: every query sees at least itself. With
    ``head_norm`` every row of a head's output is rms_norm(row, weight, eps) * scale before it is rounded.

    Maps, sums and norm in fp32; products of fp32 tensors are not rounded to TF32. Returns (B, G*group, Tq, dv) in
    q.dtype, ordered in memory as q is. Differentiable once, in q, k, v, lam and the norm's weight, with the same bits
    in every run.
    """
    weight, norm = (None, None) if head_norm is None else (head_norm.weight, (head_norm.eps, head_norm.scale))
    starts = None if document_start is None else document_start.contiguous()
    output: Tensor = _FusedAttention.apply(  # type: ignore[no-untyped-call]
        *(_with_dense_rows(x) for x in (q, k, v)), lam, weight, window, starts, norm
    )
    return output


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lam: Tensor | None,
        weight: Tensor | None,
        window: int | None,
        starts: Tensor | None,
        norm: tuple[float, float] | None,
    ) -> Tensor:
        call = _Call(q, k, v, lam, weight, window, starts, norm)
        out, raw, second, lse = _forward(call, save=any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, v, lam, weight, starts, out if raw is None else raw, second, lse)
        ctx.window, ctx.norm = window, norm
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lam, weight, starts, out, second, lse = ctx.saved_tensors
        call = _Call(q, k, v, lam, weight, ctx.window, starts, ctx.norm)
        grad_output = _with_dense_rows(grad_output)
        grad, sums, grad_weight = _row_sums(call, grad_output, out, second)
        grad_k, grad_v = _grads_of_keys(call, grad, lse, sums)
        grad_q = _grad_of_queries(call, grad, lse, sums)
        grad_lam = None if lam is None else -sums[1].sum().to(lam.dtype)
        return grad_q, grad_k, grad_v, grad_lam, grad_weight, None, None, None


class _Call:
    """The arguments of one attention, and what all of its kernels are told about them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lam: Tensor | None,
        weight: Tensor | None,
        window: int | None,
        starts: Tensor | None,
        norm: tuple[float, float] | None,
    ) -> None:
        self.q, self.k, self.v, self.lam, self.weight, self.starts = q, k, v, lam, weight, starts
        self.maps = 1 if lam is None else 2
        self.batches, self.groups, self.length_k, self.value_width = v.shape
        self.heads, self.length_q, self.width = q.shape[1] // self.maps, q.shape[2], q.shape[3]
        self.lanes = self.batches * self.heads
        self.window, self.has_norm = window, norm is not None
        self.eps, self.norm_scale = norm or (0.0, 1.0)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return self.batches, self.heads, self.length_q, self.value_width

    def widths(self) -> dict[str, int]:
        """The kernels' constants for d and dv."""
        block_d, block_dv = padded(self.width), padded(self.value_width)
        return dict(D=self.width, DV=self.value_width, BLOCK_D=block_d, BLOCK_DV=block_dv)

    def constants(self, blocks: Tiles) -> dict[str, Any]:
        """The constants that the kernels over blocks of scores share, and how they are run."""
        return dict(
            GROUP=self.heads // self.groups,
            MAPS=self.maps,
            **self.widths(),
            ROWS=blocks.rows,
            KEYS=blocks.keys,
            HAS_WINDOW=self.window is not None,
            HAS_DOCUMENTS=self.starts is not None,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )

    def tiles(self, kernel: str) -> Tiles:
        """The blocks of ``forward``, ``backward_kv`` or ``backward_q``."""
        name = f"{'attention' if self.maps == 1 else 'differential'}_{kernel}"
        return tiles(name, padded(self.width), padded(self.value_width), self.q.element_size())

    def band(self) -> tuple[int, int, int, float]:
        """Lengths, window and scale, as the kernels take them."""
        return self.length_q, self.length_k, self.window or 0, self.width**-0.5


def _forward(call: _Call, *, save: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Output, and with ``save`` the output before the norm, that of the second map, and the log-sum-exps."""
    q, k, v = call.q, call.k, call.v
    out = _empty_ordered_as(q, call.output_shape)
    raw = _empty_ordered_as(q, call.output_shape) if save and call.has_norm else None
    second = _empty_ordered_as(q, call.output_shape) if save and call.maps == 2 else None
    lse = _per_query(call) if save else None
    blocks = call.tiles("forward")
    with device_of(q):
        attention_forward[(triton.cdiv(call.length_q, blocks.rows) * call.lanes,)](
            q, k, v, call.lam, call.starts, call.weight, out, raw, second, lse,
            *_strides(q), *_strides(k), *_strides(v), *_strides(out), call.heads, call.lanes, *call.band(),
            call.eps, call.norm_scale,
            HAS_NORM=call.has_norm, HAS_WEIGHT=call.weight is not None, SAVE=save, **call.constants(blocks),
        )  # fmt: skip
    return out, raw, second, lse


def _row_sums(
    call: _Call, grad: Tensor, out: Tensor, second: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient of the output before the norm, the row sums D (maps, lanes, Tq) and the weight's gradient."""
    sums = _per_query(call)
    rows = _SUMS_BLOCK // padded(call.value_width)
    programs = triton.cdiv(call.length_q, rows) * call.lanes
    grad_out = _empty_ordered_as(out, out.shape) if call.has_norm else None
    shares = None if call.weight is None else sums.new_empty(programs, call.value_width)
    with device_of(out):
        attention_row_sums[(programs,)](
            grad, out, second, call.lam, call.weight, grad_out, shares, sums,
            *_strides(grad), *_strides(out), call.heads, call.lanes, call.length_q, call.eps, call.norm_scale,
            MAPS=call.maps, DV=call.value_width, BLOCK_DV=padded(call.value_width), ROWS=rows,
            HAS_NORM=call.has_norm, HAS_WEIGHT=call.weight is not None, num_warps=8,
        )  # fmt: skip
    grad_weight = None if call.weight is None or shares is None else shares.sum(0).to(call.weight.dtype)
    return grad if grad_out is None else grad_out, sums, grad_weight


def _grads_of_keys(call: _Call, grad: Tensor, lse: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = call.q, call.k, call.v
    grad_k, grad_v = (_empty_ordered_as(x, x.shape) for x in (k, v))
    blocks = call.tiles("backward_kv")
    with device_of(q):
        attention_backward_kv[(triton.cdiv(call.length_k, blocks.keys) * call.batches * call.groups,)](
            q, k, v, call.lam, call.starts, _ends_of_blocks(call, blocks.keys), grad, lse, sums, grad_k, grad_v,
            *_strides(q), *_strides(k), *_strides(v), *_strides(grad), *_strides(grad_k), *_strides(grad_v),
            call.batches, call.groups, *call.band(), **call.constants(blocks),
        )  # fmt: skip
    return grad_k, grad_v


def _grad_of_queries(call: _Call, grad: Tensor, lse: Tensor, sums: Tensor) -> Tensor:
    q, k, v = call.q, call.k, call.v
    grad_q = _empty_ordered_as(q, q.shape)
    blocks = call.tiles("backward_q")
    with device_of(q):
        attention_backward_q[(triton.cdiv(call.length_q, blocks.rows) * call.lanes,)](
            q, k, v, call.lam, call.starts, grad, lse, sums, grad_q,
            *_strides(q), *_strides(k), *_strides(v), *_strides(grad), *_strides(grad_q),
            call.heads, call.lanes, *call.band(), **call.constants(blocks),
        )  # fmt: skip
    return grad_q


def _ends_of_blocks(call: _Call, keys: int) -> Tensor | None:
    """(2, B, blocks of ``keys`` keys): how many queries have documents that start up to a block's last, first key.

    The starts do not decrease, so those are the first queries; asked on the device, without waiting for it.
    """
    if call.starts is None:
        return None
    first = torch.arange(0, call.length_k, keys, device=call.starts.device)
    last = (first + keys - 1).clamp(max=call.length_k - 1)
    bounds = torch.stack((last, first))[:, None].expand(-1, call.batches, -1).contiguous()
    starts = call.starts.expand(2, -1, -1).contiguous()
    return torch.searchsorted(starts, bounds, right=True)


def _per_query(call: _Call) -> Tensor:
    """Room for one fp32 per map, lane and query."""
    return torch.empty(call.maps, call.lanes, call.length_q, dtype=torch.float32, device=call.q.device)


def _with_dense_rows(x: Tensor) -> Tensor:
    """``x``, copied only where the elements of a row do not follow each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of batch, head and token."""
    return x.stride()[:3]


def _empty_ordered_as(x: Tensor, shape: Sequence[int]) -> Tensor:
    """A dense tensor of ``shape`` whose batch, heads and tokens lie in the order in memory that those of ``x`` have.

    Views of (T, B, H, d) so get results whose heads merge into one dimension without a copy.
    """
    order = sorted(range(3), key=lambda dimension: x.stride()[dimension], reverse=True)
    inverse = [order.index(dimension) for dimension in range(3)]
    return x.new_empty(*(shape[dimension] for dimension in order), shape[3]).permute(*inverse, 3)
