"""How the model is divided: Megatron-Core's process groups, sharded linears, schedules, optimizer and checkpoints.

On a machine without CUDA the CPU backend is installed before Megatron-Core is used, wherever the import starts.
"""

import warnings

import torch

# The start-up banner and ``trine doctor`` say which optional libraries are absent, once and not per module.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")

if not torch.cuda.is_available():
    from .cpu import install

    install()
