"""Causal attention within a window, YOCO's alternative self-decoder."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ...configs.stack import SharedKV, SlidingWindowSegment
from ...kernels.attention import attention
from ..over_context import attend_window
from ..sequences import Sequences
from ..site import Site
from .attention import Attention


class SlidingWindow(Attention):
    """Each query sees its own token and the ``window`` - 1 before it."""

    def __init__(self, segment: SlidingWindowSegment, site: Site, shared_kv: SharedKV | None) -> None:
        super().__init__(segment, site, shared_kv)
        self.window = segment.window

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
        core = partial(attention, window=self.window, backend=self.site.kernels)
        return attend_window(core, q, k, v, window=self.window, sequences=sequences)
