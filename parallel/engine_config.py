"""The part of Megatron-Core's configuration that the engine itself reads, derived from ours."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from ..configs.schema import Config
from ..configs.stack import expand

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


_HISTORY = 1024
"""Transformer Engine's own default; Megatron-Core's is 1."""


def _transformer_engine(config: Config) -> dict[str, Any]:
    """How Transformer Engine's linear maps are to be 8-bit; our own need nothing of it."""
    fp8 = config.precision.fp8
    if fp8 is None or fp8.backend != "te":
        return {}
    both_ways = fp8.recipe in ("blockwise", "mxfp8")
    return {
        "fp8": "e4m3" if both_ways else "hybrid",
        "fp8_recipe": fp8.recipe,
        "fp8_amax_history_len": _HISTORY,
        "fp8_amax_compute_algo": "max",
    }


def engine_config(config: Config, device: torch.device) -> TransformerConfig:
    """Megatron-Core's configuration of the layout and the schedule.

    The blocks are ours, so fields about attention are only made to pass Megatron-Core's own checks.
    """
    parallel = config.parallel
    on_gpu = device.type == "cuda"
    interleaved = parallel.virtual_pipeline > 1
    # Two messages between the same pair of ranks in one batch are matched by order, so two interleaved stages
    # must send and receive separately.
    overlap = interleaved and parallel.pipeline == 2
    dtype = DTYPES[config.precision.compute]
    return TransformerConfig(
        **_transformer_engine(config),
        num_layers=len(expand(config.model.stack)),
        hidden_size=config.model.hidden_size,
        ffn_hidden_size=config.model.ffn_hidden_size,
        num_attention_heads=parallel.tensor,
        kv_channels=1,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        pipeline_dtype=dtype,
        params_dtype=torch.float32,
        bf16=dtype is torch.bfloat16,
        overlap_p2p_comm=overlap,
        batch_p2p_comm=not overlap,
        # gloo's isend keeps no hold on a tensor whose storage is released: the receiver would get garbage.
        deallocate_pipeline_outputs=on_gpu or not overlap,
        deterministic_mode=config.train.deterministic,
        gradient_accumulation_fusion=on_gpu and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        cuda_graph_scope=[],
    )
