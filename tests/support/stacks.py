"""Stacks of every mixer, at odd sizes: grouped heads, head counts and widths that are no powers of two."""

from __future__ import annotations

from typing import Any

SHARED_KV: dict[str, Any] = {"shared_kv": {"kv_heads": 4, "head_dim": 6}}
SELF_LAYER: dict[str, Any] = {"mixer": "attention", "layers": 1, "heads": 6, "kv_heads": 2, "head_dim": 10}
MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"heads": 12, "kv_heads": 4, "head_dim": 6},
    "sliding_window": {"heads": 6, "kv_heads": 2, "head_dim": 10, "window": 23},
    "differential": {"heads": 12, "kv_heads": 4, "head_dim": 4},
    "differential_v2": {"heads": 12, "kv_heads": 4, "head_dim": 6},
    "retention": {"heads": 6, "head_dim": 8, "value_head_dim": 10},
    "gated_retention": {"heads": 6, "head_dim": 8},
    "cross_attention": {"heads": 12},
    "differential_cross_attention": {"heads": 6},
}


def stack_of(mixer: str) -> list[dict[str, Any]]:
    """Five layers of one mixer, which no pipeline divides evenly; a cross mixer has a self layer before it."""
    segment = {"mixer": mixer, **MIXERS[mixer]}
    if "cross" in mixer:
        return [SELF_LAYER, SHARED_KV, segment | {"layers": 4}]
    return [segment | {"layers": 5}]


def hybrid() -> list[dict[str, Any]]:
    """All mixers in one model of eight layers."""
    own = [{"mixer": name, "layers": 1, **values} for name, values in MIXERS.items() if "cross" not in name]
    cross = [{"mixer": name, "layers": 1, **values} for name, values in MIXERS.items() if "cross" in name]
    return [*own, SHARED_KV, *cross]
