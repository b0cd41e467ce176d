"""What every mixer is: a module from normed hidden states to a residual update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from torch import Tensor, nn

from ...configs.stack import MixerSegment, SharedKV
from ...parallel.parameters import Law, Section
from ..recompute import recomputed
from ..sequences import Sequences
from ..site import Site

SegmentT = TypeVar("SegmentT", bound=MixerSegment)

RETENTION_GAIN = 2**-2.5
"""Gain of the xavier-uniform law of retention's input projections (torchscale and YOCO)."""


class Mixer(nn.Module, ABC, Generic[SegmentT]):
    """Base of the mixers: ``input`` projections, what happens between them (``mix``), and the ``output`` projection.

    ``heads`` counts this rank's heads; ``width`` is that of one query/key head.
    """

    input: nn.Module
    """A column-parallel map: one tensor per projection."""
    output: nn.Module
    """A row-parallel map."""

    def __init__(self, segment: SegmentT, site: Site, shared_kv: SharedKV | None) -> None:
        super().__init__()
        self.segment, self.site, self.shared_kv = segment, site, shared_kv
        self.heads = segment.heads // site.tensor_size
        self.width = segment.width(site.model.hidden_size)

    def forward(self, x: Tensor, kv: Tensor | None, sequences: Sequences) -> Tensor:
        """Mix x (S_local, B, D); ``kv`` is the shared K,V of whole sequences, (S, B, W), for a cross mixer.

        Returns (S_local, B, D).
        """
        projections = self.input(x)
        inputs = (sequences, kv, *projections)
        mixed = recomputed(self.mix, *inputs) if self.site.recompute == "selective" else self.mix(*inputs)
        out: Tensor = self.output(mixed)
        return out

    @abstractmethod
    def mix(self, sequences: Sequences, kv: Tensor | None, *projections: Tensor) -> Tensor:
        """From the input projections, each (S, B, W) of this rank's tokens and heads, to the output's input."""

    @classmethod
    @abstractmethod
    def flops_per_token(
        cls, segment: SegmentT, shared_kv: SharedKV | None, hidden_size: int, sequence_length: int
    ) -> float:
        """Forward floating-point operations of the whole mixer (all ranks) per token, projections included.

        Causal attention is counted over the mean number of keys, (S + 1) / 2, whatever the documents.
        """

    def project_in(self, rows: dict[str, int], law: Law) -> nn.Module:
        """One column-parallel product for several projections, all drawn from ``law``."""
        return self.project_in_sections(
            [Section(name, (n, self.site.model.hidden_size), law) for name, n in rows.items()]
        )

    def project_in_sections(self, sections: Sequence[Section]) -> nn.Module:
        """One column-parallel product whose projections have laws of their own."""
        return self.site.linears.column(self.site.model.hidden_size, sections, self.site.engine, self.site.groups)

    def project_out(self, columns: int, law: Law) -> nn.Module:
        """The row-parallel product back to the hidden width."""
        return self.site.linears.row(columns, self.site.model.hidden_size, law, self.site.engine, self.site.groups)


def projection_flops(hidden_size: int, rows_and_columns: int) -> float:
    """Operations per token of projections from and to the hidden width with this many rows and columns in total."""
    return 2.0 * hidden_size * rows_and_columns


def mean_keys(sequence_length: int, window: int | None = None) -> float:
    """Mean number of keys that a query sees under a causal mask, within a window if there is one."""
    if window is None or window >= sequence_length:
        return (sequence_length + 1) / 2
    ramp = window * (window + 1) / 2
    return (ramp + (sequence_length - window) * window) / sequence_length
