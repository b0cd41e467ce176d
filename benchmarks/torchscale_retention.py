"""torchscale's retention as a peer: the unmodified module, without the heavy packages that its other modules import."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from harness import need
from torch import Tensor

INSTALL = "pip install --no-deps torchscale"


def _stand_in(name: str, *attributes: str) -> None:
    """An empty module of this name: what retention does not need."""
    if name not in sys.modules:
        module = ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, None)
        sys.modules[name] = module


def load(embed_dim: int, value_dim: int, heads: int) -> tuple[Any, Any]:
    """MultiScaleRetention and RetNetRelPos of torchscale, of these sizes."""
    need("torchscale", INSTALL)
    _stand_in("fairscale")
    _stand_in("fairscale.nn", "checkpoint_wrapper", "wrap")
    for name in ("timm", "timm.models"):
        _stand_in(name)
    _stand_in("timm.models.layers", "drop_path")
    from torchscale.architecture.retnet import RetNetRelPos
    from torchscale.component.multiscale_retention import MultiScaleRetention

    options = SimpleNamespace(
        decoder_embed_dim=embed_dim, decoder_retention_heads=heads, recurrent_chunk_size=512, layernorm_eps=1e-6,
        multiway=False,
    )  # fmt: skip
    return MultiScaleRetention(options, embed_dim, value_dim, heads), RetNetRelPos(options)


def chunkwise(module: Any, positions: Any, q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Its chunkwise core: q, k (B, H, T, dk) rotated and scaled, v (B, T, H * dv) -> (B, T, H, dv)."""
    positions.recurrent_chunk_size = chunk
    with torch.no_grad():
        _, decay = positions(q.shape[2], chunkwise_recurrent=True)
    output: Tensor = module.chunk_recurrent_forward(q, k, v, decay)
    return output.reshape(v.shape[0], v.shape[1], module.num_heads, -1)
