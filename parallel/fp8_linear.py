"""Column- and row-parallel products of 8-bit operands, with the communication of Megatron-Core's.

Scales do not depend on the layout: the largest magnitude of what is divided over tensor or context ranks is taken over
these. Under sequence parallelism activations with one scale travel as 8-bit numbers, half the bytes of bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ..kernels.fp8.formats import E4M3, SCALINGS, Block
from ..kernels.fp8.products import ProductBackend, product
from ..kernels.fp8.quantise import Operand, largest_magnitude, quantise, quantise_blocks
from .fp8_history import ROLES, Histories
from .linear import ColumnLinear, RowLinear
from .parameters import Law, Section

_INPUT, _WEIGHT, _GRADIENT = range(len(ROLES))

Groups = tuple[dist.ProcessGroup | None, dist.ProcessGroup | None, dist.ProcessGroup | None]


@dataclass(frozen=True)
class Fp8Choice:
    """How 8-bit products are made: a backend of ``kernels.fp8`` and the name of a recipe."""

    backend: ProductBackend
    recipe: str


@dataclass(frozen=True)
class _Weight:
    """A weight (N, K) as operand of the forward product and, transposed, of that with the gradient."""

    source: tuple[int, int]
    forward: Operand
    backward: Operand


class Fp8Product:
    """The three products of one linear map: y = x W^T, dx = dy W, dW = dy^T x, each of 8-bit operands.

    ``groups`` are, for input, weight and gradient, the ranks over which it is divided; None where each rank has all of
    it.
    """

    def __init__(self, choice: Fp8Choice, groups: Groups) -> None:
        self.choice, self._groups = choice, groups
        self.scaling = SCALINGS[choice.recipe]
        self.on = True
        """Whether the map multiplies 8-bit operands; off, it is Megatron-Core's in the compute type."""
        self._histories: Histories | None = None
        self._index = 0
        self._weight: _Weight | None = None

    def attach(self, histories: Histories, index: int) -> None:
        """Take scales from a history, as ``delayed`` does."""
        self._histories, self._index = histories, index

    def forget_weight(self) -> None:
        """Quantise the weight anew at its next use.

        The distributed optimizer writes new weights into a buffer that they are views of, which no tensor's version
        counter sees. So whoever changes weights, or cannot know, calls this; all microbatches of a step then share
        one quantisation.
        """
        self._weight = None

    def weight(self, weight: Tensor) -> _Weight:
        """The operands of ``weight`` (N, K), made at the first use."""
        source = (weight.data_ptr(), weight._version)
        if self._weight is None or self._weight.source != source:
            forward, backward = self._both(weight.detach(), self.scaling.weight, _WEIGHT)
            self._weight = _Weight(source, forward, backward)
        return self._weight

    def input(self, x: Tensor) -> Operand:
        """An input (M, K), of which ranks may hold different parts, for the forward product."""
        return self._operand(x, self.scaling.rows, _INPUT)

    def input_by_token(self, x: Tensor) -> Operand:
        """The same transposed, (K, M), for the product with the gradient. Only of recipes with blocks."""
        return self._operand(x.t(), self.scaling.rows, _INPUT)

    def gradient(self, dy: Tensor) -> tuple[Operand, Operand]:
        """A gradient (M, N) for the product with the weight, and transposed for that with the input."""
        return self._both(dy, self.scaling.rows, _GRADIENT)

    def multiply(self, a: Operand, b: Operand, out_dtype: torch.dtype) -> Tensor:
        """a (M, K) times b (N, K) transposed."""
        return product(a, b, out_dtype, self.choice.backend)

    def _both(self, x: Tensor, block: Block | None, role: int) -> tuple[Operand, Operand]:
        straight = self._operand(x, block, role)
        return straight, straight.transposed if block is None else self._operand(x.t(), block, role)

    def _operand(self, x: Tensor, block: Block | None, role: int) -> Operand:
        dtype = self.scaling.gradient if role == _GRADIENT else E4M3
        if block is not None:
            return quantise_blocks(x, block, dtype)
        return quantise(x, self._amax(x, role), dtype)

    def _amax(self, x: Tensor, role: int) -> Tensor:
        """The magnitude that the scale of ``x`` is made for."""
        own, histories = largest_magnitude(x), self._histories
        if histories is not None:
            histories.note(self._index, role, own)
        group = self._groups[role]
        if group is not None and not (histories is not None and histories.has_past(self._index, role)):
            dist.all_reduce(own, op=dist.ReduceOp.MAX, group=group)
        if histories is None:
            return own
        past = histories.in_force[self._index, role]
        # A past magnitude would hide an inf or NaN of now, which must show in the result; one of 0 gives no scale.
        return torch.where(own.isinf() | (past == 0), own, past)


class _Fp8Linear(torch.autograd.Function):
    """y = x W^T of a rank's shard of W: gathers x before, sums dx after, as Megatron-Core's function does."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, fp8: Fp8Product, gathers: bool, sums: bool, group: dist.ProcessGroup
    ) -> Tensor:
        """x (S_local, B, K) -> (S, B, N); with ``gathers`` x is a part of the sequence, with ``sums`` dx is summed."""
        ctx.fp8, ctx.gathers, ctx.sums, ctx.group, ctx.shape = fp8, gathers, sums, group, x.shape
        ctx.weight = fp8.weight(weight)
        rows = x.reshape(-1, x.shape[-1])
        if fp8.scaling.rows is None:
            own = fp8.input(rows)
            ctx.save_for_backward(own.values, own.scale)
            operand = Operand(_gathered(own.values, group), own.scale) if gathers else own
        else:
            ctx.save_for_backward(rows)
            operand = fp8.input(_gathered(rows, group) if gathers else rows)
        y = fp8.multiply(operand, ctx.weight.forward, x.dtype)
        return y.view(-1, x.shape[1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """dy (S, B, N) -> dx (S_local, B, K) and dW (N, K)."""
        (dy,), fp8, group = gradients, ctx.fp8, ctx.group
        by_row, by_column = fp8.gradient(dy.reshape(-1, dy.shape[-1]))
        dx: Tensor = fp8.multiply(by_row, ctx.weight.backward, dy.dtype)
        waits, handle = dx, None
        if ctx.gathers:
            waits = dx.new_empty(dx.shape[0] // group.size(), dx.shape[1])
            handle = dist.reduce_scatter_tensor(waits, dx, group=group, async_op=True)
        elif ctx.sums:
            handle = dist.all_reduce(dx, group=group, async_op=True)
        dw = fp8.multiply(by_column, _saved_input(ctx), dy.dtype)
        if handle is not None:
            handle.wait()
        return waits.view(ctx.shape), dw, None, None, None, None


def _saved_input(ctx: Any) -> Operand:
    """The input (K, M) of the forward product, as the gradient of the weight needs it."""
    x, *scale = ctx.saved_tensors
    whole = _gathered(x, ctx.group) if ctx.gathers else x
    if scale:
        return Operand(whole, scale[0]).transposed
    operand: Operand = ctx.fp8.input_by_token(whole)
    return operand


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The parts (M, K) of all ranks below each other."""
    eight_bit = x.element_size() == 1
    part = (x.view(torch.uint8) if eight_bit else x).contiguous()
    whole = part.new_empty(part.shape[0] * group.size(), part.shape[1])
    dist.all_gather_into_tensor(whole, part, group=group)
    return whole.view(x.dtype) if eight_bit else whole


class Fp8ColumnLinear(ColumnLinear):
    """``ColumnLinear`` whose products have 8-bit operands."""

    def __init__(
        self,
        input_size: int,
        sections: Sequence[Section],
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        choice: Fp8Choice,
    ) -> None:
        super().__init__(input_size, sections, config, groups)
        tokens = _over(groups, tensor=bool(config.sequence_parallel), context=True)
        outputs = _over(groups, tensor=True, context=True)
        self.fp8 = Fp8Product(choice, (tokens, _over(groups, tensor=True, context=False), outputs))

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        if not self.fp8.on:
            y: Tensor = super()._forward_impl(input, weight, **options)
            return y
        return _multiplied(
            input, weight, self.fp8, options["sequence_parallel"], options["allreduce_dgrad"], self.tp_group
        )


class Fp8RowLinear(RowLinear):
    """``RowLinear`` whose products have 8-bit operands; the partial sums travel in the compute type."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        law: Law,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        choice: Fp8Choice,
    ) -> None:
        super().__init__(input_size, output_size, law, config, groups)
        columns = _over(groups, tensor=True, context=True)
        # Every tensor rank has the gradient of the sum.
        tokens = _over(groups, tensor=False, context=True)
        self.fp8 = Fp8Product(choice, (columns, _over(groups, tensor=True, context=False), tokens))

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        if not self.fp8.on:
            y: Tensor = super()._forward_impl(input, weight, **options)
            return y
        return _multiplied(input, weight, self.fp8, False, False, self.tp_group)


def _multiplied(
    x: Tensor, weight: Tensor, fp8: Fp8Product, gathers: bool, sums: bool, group: dist.ProcessGroup
) -> Tensor:
    y: Tensor = _Fp8Linear.apply(x, weight, fp8, gathers, sums, group)  # type: ignore[no-untyped-call]
    return y


def _over(groups: ProcessGroupCollection, *, tensor: bool, context: bool) -> dist.ProcessGroup | None:
    """The ranks over which something is divided: tensor ranks, context ranks, both or none."""
    tensor, context = tensor and groups.tp.size() > 1, context and groups.cp.size() > 1
    if tensor and context:
        both: dist.ProcessGroup = groups.tp_cp
        return both
    return groups.tp if tensor else groups.cp if context else None
