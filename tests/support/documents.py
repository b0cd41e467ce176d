"""A job for the rank pool: what a document's logits depend on, under any division of the sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trine.configs.checks import check_layout
from trine.configs.schema import Config
from trine.models.build import build_chunks
from trine.models.language_model import LanguageModel
from trine.parallel.topology import build_topology, leave_topology, local_device

STARTS = (0, 29, 81)
"""Documents of a window, at odd places: none is the border of a chunk of any layout under test."""


def leaks(rank: int, world_size: int, *, config: dict[str, Any]) -> dict[str, float]:
    """How this rank's logits of the last document move when the documents before it change.

    ``masked``, ``unmasked``: the largest change of a logit, with and without document masking. ``alone``: the largest
    difference to the same document in a window of its own, for a rank that holds any of it.
    """
    run = Config.model_validate(config)
    topology = build_topology(check_layout(run, world_size), local_device(rank))
    (model,) = build_chunks(run, topology)
    tokens = torch.randint(0, 200, (2, run.train.sequence_length), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, : STARTS[-1]] = (tokens[:, : STARTS[-1]] + 1) % 200
    starts = torch.zeros_like(tokens)
    for start in STARTS:
        starts[:, start:] = start
    found = {"masked": _change(model, tokens, changed, starts), "unmasked": _change(model, tokens, changed, None)}
    # The document moved to the front of the window, where it is the first: what follows it cannot reach back.
    alone = torch.cat([tokens[:, STARTS[-1] :], tokens[:, : STARTS[-1]]], dim=1)
    length = tokens.shape[1] - STARTS[-1]
    within = _whole(model, tokens, starts)[STARTS[-1] :]
    found["alone"] = float((_whole(model, alone, None)[:length] - within).abs().max())
    leave_topology()
    return found


@torch.no_grad()
def _change(model: LanguageModel, tokens: Tensor, changed: Tensor, starts: Tensor | None) -> float:
    moved = model(changed, document_start=starts) - model(tokens, document_start=starts)
    mine = moved[model.context.share.positions >= STARTS[-1]]
    return float(mine.abs().max()) if mine.numel() else 0.0


@torch.no_grad()
def _whole(model: LanguageModel, tokens: Tensor, starts: Tensor | None) -> Tensor:
    """Logits (S, B, vocabulary) of all context ranks."""
    return model.context.gather(model(tokens, document_start=starts))
