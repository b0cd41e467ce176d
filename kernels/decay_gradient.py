"""The gradient of retention's per-token log-decays, from what depends on their sums inside the chunks."""

from __future__ import annotations

import torch
from torch import Tensor


def log_decay_gradient(grad_sums: Tensor, grad_exits: Tensor, resets: Tensor | None) -> Tensor:
    """Gradient (B, H, N, C) of the log-decays in N chunks of C tokens.

    ``grad_sums`` (B, H, N, C) are the gradients q_i . dq_i - k_i . dk_i of the running sums c_i, and ``grad_exits``
    (B, H, N) those that c_C has besides: <U, S_out> of each chunk. ``resets`` is (B, 1, N, C).
    """
    grad = grad_sums.clone()
    grad[..., -1] += grad_exits
    # c_i contains the log-decays up to token i, so a log-decay collects the gradients from its own token on.
    grad = grad.flip(-1).cumsum(dim=-1).flip(-1)
    return grad if resets is None else _without_later_documents(grad, resets)


def _without_later_documents(grad: Tensor, resets: Tensor) -> Tensor:
    """Take what comes from the next reset on out of sums (B, H, N, C) that each run from a token to the chunk's end.

    The parts of later documents cancel, but only up to rounding: a document would train on its successors' noise. The
    decay at a reset itself multiplies nothing.
    """
    count = resets.cumsum(dim=-1)
    following = torch.searchsorted(count, count, right=True).expand(grad.shape)
    later = torch.nn.functional.pad(grad, (0, 1)).gather(-1, following)
    return (grad - later).masked_fill_(resets, 0)
