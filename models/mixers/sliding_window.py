"""Causal attention within a window, YOCO's alternative self-decoder."""

from __future__ import annotations

from ...configs.stack import SharedKV, SlidingWindowSegment
from ..site import Site
from .attention import Attention


class SlidingWindow(Attention):
    """Each query sees its own token and the ``window`` - 1 before it."""

    def __init__(self, segment: SlidingWindowSegment, site: Site, shared_kv: SharedKV | None) -> None:
        super().__init__(segment, site, shared_kv)
        self.window = segment.window
