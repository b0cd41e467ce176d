"""Pipeline stages, and what travels between them: the hidden state and, where it is needed, YOCO's shared K,V.

Megatron-Core's schedules pass ONE tensor over each link and back-propagate through it alone. So the shared K,V is
appended to the hidden state along the last dimension: ``[S_local, B, hidden + kv width]``. On a tensor rank K,V is
``[S, B, heads / tensor size, ...]``, which under sequence parallelism is re-viewed as S / tensor size rows; sender
and receiver hold the same tensor rank, so this is a bijection. Autograd then does the rest: the gradients of K,V
from later stages come back inside the boundary's gradient and add to the local ones.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ..configs.stack import LayerPlan, SharedKV, carried_kv


@dataclass(frozen=True)
class Stage:
    """One model chunk: layers [first, last) of the stack, and whether it holds the ends of the model."""

    first: int
    last: int
    has_embedding: bool
    has_output: bool


def stages_of(split: tuple[int, ...], pipeline: int, pipeline_rank: int) -> list[Stage]:
    """The chunks of one pipeline rank, where ``split`` counts the layers of each chunk along the model.

    Chunk c of rank r is number c * pipeline + r along the model.
    """
    starts = starts_of(split)
    return [
        Stage(starts[n], starts[n] + split[n], n == 0, n == len(split) - 1)
        for n in range(pipeline_rank, len(split), pipeline)
    ]


def starts_of(split: tuple[int, ...]) -> list[int]:
    """The first layer of each pipeline chunk."""
    return [0, *accumulate(split[:-1])]


def kv_width(kv: SharedKV, config: TransformerConfig) -> int:
    """Elements of K,V per row of the boundary tensor on one tensor rank."""
    full = 2 * kv.kv_heads * kv.head_dim
    return full if config.sequence_parallel else full // int(config.tensor_model_parallel_size)


def pack(hidden: Tensor, kv: Tensor | None) -> Tensor:
    """Join hidden (S_local, B, D) and shared K,V (S, B, W) into one fresh boundary tensor."""
    if kv is None:
        return hidden
    return torch.cat([hidden, kv.reshape(*hidden.shape[:2], -1)], dim=-1)


def unpack(boundary: Tensor, hidden_size: int, local_length: int) -> tuple[Tensor, Tensor | None]:
    """The inverse of ``pack``: hidden (S_local, B, D) and K,V (local_length, B, W) or None."""
    if boundary.shape[-1] == hidden_size:
        return boundary, None
    hidden, kv = torch.split(boundary, [hidden_size, boundary.shape[-1] - hidden_size], dim=-1)
    return hidden.contiguous(), kv.reshape(local_length, boundary.shape[1], -1)


class KVCarryCommunicator(P2PCommunicator):  # type: ignore[misc]
    """Point-to-point communication in which each link has its own width, known from the stack alone.

    Megatron-Core asks the other side for shapes when ``variable_seq_lengths`` is set; here the answer comes from a
    static table in the order in which the schedule receives. One communicator serves one call of a schedule.
    """

    def __init__(
        self,
        plans: tuple[LayerPlan, ...],
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        split: tuple[int, ...],
        rows: int,
        micro_batch_size: int,
        num_microbatches: int,
        forward_only: bool,
    ) -> None:
        """``split`` counts the layers of each chunk; ``rows`` is the local sequence length of the hidden state."""
        private = copy.copy(config)
        private.variable_seq_lengths = True
        super().__init__(groups.pp, private)
        self._rows, self._batch, self._hidden = rows, micro_batch_size, int(config.hidden_size)
        stage, stages = groups.pp.rank(), groups.pp.size()
        chunks = config.virtual_pipeline_model_parallel_size or 1
        starts = starts_of(split)

        def input_width(number: int) -> int:
            kv = carried_kv(plans, starts[number])
            return self._hidden + (0 if kv is None else kv_width(kv, config))

        order = _chunk_order(num_microbatches, chunks, config)
        forward = [chunk * stages + stage for chunk in order]
        backward = [] if forward_only else [(chunks - 1 - chunk) * stages + stage for chunk in order]
        self.measures_waits = False
        self.waited_s = 0.0
        """Seconds spent in sending and receiving, most of them waiting for the other side."""
        self._forward = iter([input_width(n) for n in forward if n > 0])
        self._backward = iter([input_width(n + 1) for n in backward if n + 1 < stages * chunks])

    def _communicate(self, **arguments: Any) -> Any:
        if self.measures_waits and torch.cuda.is_available():
            torch.cuda.synchronize()  # or the rank's own unfinished work would count as waiting
        started = time.perf_counter()
        try:
            return super()._communicate(**arguments)
        finally:
            self.waited_s += time.perf_counter() - started

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        return self._shape(recv_prev, self._forward), self._shape(recv_next, self._backward)

    def _shape(self, receives: bool, widths: Iterator[int]) -> list[int]:
        return [self._rows, self._batch, next(widths)] if receives else [0, 0, 0]

    def check_finished(self) -> None:
        """Raise RuntimeError unless every expected tensor was received: a schedule that differs from the table."""
        if next(self._forward, None) is not None or next(self._backward, None) is not None:
            raise RuntimeError("the pipeline schedule received fewer tensors than its table lists")


def _chunk_order(num_microbatches: int, chunks: int, config: TransformerConfig) -> list[int]:
    if chunks == 1:
        return [0] * num_microbatches
    table = get_schedule_table(num_microbatches, chunks, config.microbatch_group_size_per_vp_stage)
    return [chunk for _, chunk in table]
