"""The same bits from the same inputs, on the same layout and the same machines."""

from __future__ import annotations

import os

import torch


def use_deterministic_kernels() -> None:
    """Let torch choose kernels whose sums have a fixed order, and warn of one that has no such form.

    Of ours that is the running sum of gated retention's decays on a GPU, for which torch knows no fixed order.

    Must be called before the first use of a GPU: cuBLAS reads its work space, and NCCL its algorithm, from the
    environment.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
