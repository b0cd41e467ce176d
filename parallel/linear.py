"""Sharded linear maps and the embedding: Megatron-Core's, with blueprints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ..kernels.adjacent import joined
from ..kernels.cross_entropy import labels_of_part
from .cross_entropy import vocabulary_loss
from .main_gradients import add_rows
from .parameters import Blueprint, Law, Section, tag


def no_first_values(weight: Tensor) -> Tensor:
    """Megatron-Core's hook for first values, unused: ``parameters.initialise`` gives them by global name."""
    return weight


class ColumnLinear(ColumnParallelLinear):  # type: ignore[misc]
    """y = x W^T with the rows of W cut over tensor ranks; several projections of one input in one product.

    Args:
        input_size: width of x.
        sections: the projections in order, each with full shape (rows, input_size); rows divide by the tensor size.
    """

    def __init__(
        self, input_size: int, sections: Sequence[Section], config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        rows = sum(section.shape[0] for section in sections)
        super().__init__(
            input_size, rows, config=config, init_method=no_first_values, bias=False, skip_bias_add=False,
            gather_output=False, is_expert=False, tp_group=groups.tp,
        )  # fmt: skip
        blueprint = Blueprint(tuple(sections), partition=0)
        tag(self.weight, blueprint)
        self.local_rows = blueprint.local_rows(groups.tp.size())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (S_local, B, input_size) -> one (S, B, rows / tensor size) tensor per section."""
        y, _ = super().forward(x)
        sections: tuple[Tensor, ...] = _Sections.apply(y, self.local_rows)  # type: ignore[no-untyped-call]
        return sections


class _Sections(torch.autograd.Function):
    """Views of y (..., rows), one per section; their gradients are joined without a copy where they are adjacent."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: list[int]) -> tuple[Tensor, ...]:
        return torch.split(y, rows, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return joined(gradients), None


class RowLinear(RowParallelLinear):  # type: ignore[misc]
    """y = x W^T with the columns of W cut over tensor ranks; the sum over ranks is part of it."""

    def __init__(
        self, input_size: int, output_size: int, law: Law, config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(
            input_size, output_size, config=config, init_method=no_first_values, bias=False, input_is_parallel=True,
            skip_bias_add=False, is_expert=False, tp_group=groups.tp,
        )  # fmt: skip
        tag(self.weight, Blueprint((Section("weight", (output_size, input_size), law),), partition=1))

    def forward(self, x: Tensor) -> Tensor:
        """x (S, B, input_size / tensor size) -> (S_local, B, output_size)."""
        y: Tensor
        y, _ = super().forward(x)
        return y


class Embedding(VocabParallelEmbedding):  # type: ignore[misc]
    """Token embedding with its rows cut over tensor ranks; under sequence parallelism each rank gets its tokens."""

    def __init__(
        self, rows: int, width: int, law: Law, config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(
            rows, width, init_method=no_first_values, reduce_scatter_embeddings=config.sequence_parallel, config=config,
            tp_group=groups.tp,
        )  # fmt: skip
        tag(self.weight, Blueprint((Section("weight", (rows, width), law),), partition=0))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, S) -> (S_local, B, width)."""
        local = labels_of_part(tokens.mT, self.vocab_start_index, self.num_embeddings_per_partition)
        part: Tensor = _Rows.apply(self.weight, *local)  # type: ignore[no-untyped-call]
        scattered = self.reduce_scatter_embeddings
        summed = reduce_scatter_to_sequence_parallel_region if scattered else reduce_from_tensor_model_parallel_region
        out: Tensor = summed(part, group=self.tp_group)
        return out


class _Rows(torch.autograd.Function):
    """Rows of a weight (V, W) by index, 0 where ``here`` says that another part of the vocabulary has them.

    The gradient is added to the weight's ``main_grad`` where it has one: no tensor of V x W is made for some rows.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor, here: Tensor) -> Tensor:
        ctx.save_for_backward(weight, index, here)
        return functional.embedding(index, weight).masked_fill_(~here.unsqueeze(-1), 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        weight, index, here = ctx.saved_tensors
        rows = upstream.masked_fill(~here.unsqueeze(-1), 0.0).reshape(-1, weight.shape[1])
        if hasattr(weight, "main_grad"):
            add_rows(weight.main_grad, index.flatten(), rows)
            return None, None, None
        return torch.zeros_like(weight).index_add_(0, index.flatten(), rows), None, None


class OutputLayer(ColumnParallelLinear):  # type: ignore[misc]
    """Vocabulary logits, cut over tensor ranks, or their loss; owns no weight where it borrows the embedding's."""

    def __init__(
        self, rows: int, width: int, law: Law | None, config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(
            width, rows, config=config, init_method=no_first_values, bias=False, skip_bias_add=False,
            gather_output=False, skip_weight_param_allocation=law is None, tp_group=groups.tp,
        )  # fmt: skip
        if law is not None:
            tag(self.weight, Blueprint((Section("weight", (rows, width), law),), partition=0))

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """x (S_local, B, width) -> logits (S, B, rows / tensor size)."""
        logits: Tensor
        logits, _ = super().forward(x, weight=weight)
        return logits

    def loss(self, x: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean cross entropy of the logits that ``forward`` would give, whose whole is never made.

        x (S_local, B, width), labels (S, B) -> a scalar in fp32, the same on every tensor rank. The weight's gradient
        is added to its ``main_grad`` where it has one, whatever ``gradient_accumulation_fusion`` says.
        """
        weight = self.weight if weight is None else weight
        return vocabulary_loss(x, weight, labels, self.tp_group, sequence_parallel=self.sequence_parallel)
