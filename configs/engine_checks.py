"""Whether ``engine: deepspeed`` fits the rest of a configuration, and whether DeepSpeed is installed."""

from __future__ import annotations

import importlib.util

from .errors import UsageError
from .remedies import listed, nearest_multiples
from .schema import Config, DeepSpeed, ZeroOptimization

SET_ELSEWHERE = {
    "deepspeed.train_batch_size": "train.global_batch_size",
    "deepspeed.train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "deepspeed.gradient_accumulation_steps": "train.global_batch_size",
    "deepspeed.optimizer": "optimizer",
    "deepspeed.scheduler": "optimizer.schedule",
    "deepspeed.gradient_clipping": "optimizer.clip_grad",
    "deepspeed.fp16": "precision.compute",
    "deepspeed.bf16": "precision.compute",
    "deepspeed.amp": "precision.compute",
    "deepspeed.torch_autocast": "precision.compute",
    "deepspeed.data_types": "precision.compute",
    "deepspeed.activation_checkpointing": "train.recompute",
    "deepspeed.tensor_parallel": "parallel.tensor",
    "deepspeed.pipeline": "parallel.pipeline",
    "deepspeed.sequence_parallel_size": "parallel.context",
    "deepspeed.checkpoint": "checkpoint",
    "deepspeed.elasticity": "parallel",
    "deepspeed.seed": "train.seed",
    "deepspeed.data_efficiency": "train.sequence_ramp",
    "deepspeed.curriculum_learning": "train.sequence_ramp",
    "deepspeed.zero_optimization.cpu_offload": "deepspeed.zero_optimization.offload_optimizer.device",
    "deepspeed.zero_optimization.cpu_offload_params": "deepspeed.zero_optimization.offload_param.device",
}
"""Keys of DeepSpeed's own configuration that are no keys of ``deepspeed``, and what decides the same here."""

NOT_PASSED_ON = {
    "deepspeed": frozenset(
        "aio autotuning comms_logger compile compression_training csv_monitor "
        "dump_state flops_profiler gradient_predivide_factor memory_breakdown prescale_gradients sparse_attention "
        "steps_per_print tensorboard wall_clock_breakdown wandb zero_allow_untested_optimizer "
        "zero_force_ds_cpu_optimizer".split()
    ),
    "deepspeed.zero_optimization": frozenset(
        "compute_grad_norm elastic_checkpoint ignore_unused_parameters legacy_stage1 load_from_fp32_weights "
        "mics_hierarchical_params_gather mics_shard_size module_granularity_threshold override_module_apply "
        "parameter_alignment stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save "
        "use_all_reduce_for_fetch_params zenflow zero_hpz_partition_size zero_quantized_gradients "
        "zero_quantized_nontrainable_weights zero_quantized_weights".split()
    ),
}
"""Keys of DeepSpeed's that decide nothing that a run here needs, or what its checkpoints and parity do not cover."""

READ_AT = {
    "overlap_comm": (1, 2, 3),
    "contiguous_gradients": (1, 2, 3),
    "reduce_scatter": (1, 2, 3),
    "reduce_bucket_size": (1, 2, 3),
    "allgather_partitions": (1, 2),
    "allgather_bucket_size": (1, 2),
    "round_robin_gradients": (1, 2),
    "sub_group_size": (3,),
    "stage3_max_live_parameters": (3,),
    "stage3_max_reuse_distance": (3,),
    "stage3_prefetch_bucket_size": (3,),
    "stage3_param_persistence_threshold": (3,),
    "stage3_model_persistence_threshold": (3,),
}
"""The stages at which DeepSpeed reads a setting of ``zero_optimization``."""


def explained(section: str, key: str) -> str | None:
    """What to tell whoever brings a key of DeepSpeed's that is none here; None for one that it has not either."""
    path = f"{section}.{key}"
    if path in SET_ELSEWHERE:
        return f"{path} is what {SET_ELSEWHERE[path]} sets here: set that, and leave it out"
    if key in NOT_PASSED_ON.get(section, ()):
        return f"{path} is a setting of DeepSpeed's that trine does not pass on: leave it out"
    return None


def check_engine(config: Config) -> None:
    """Raise UsageError, in one sentence, for the first thing that the engine cannot do."""
    if config.engine == "megatron":
        if config.deepspeed is not None:
            raise UsageError("deepspeed has settings, and engine=megatron reads none of them: set engine=deepspeed")
        return
    if config.parallel.pipeline > 1:
        raise UsageError(
            f"engine=deepspeed has no pipeline stages, and parallel.pipeline={config.parallel.pipeline}: use "
            "parallel.pipeline=1 with a larger parallel.tensor or a higher deepspeed.zero_optimization.stage, or "
            "engine=megatron"
        )
    if config.precision.fp8 is not None:
        raise UsageError(
            "engine=deepspeed does not have 8-bit linear maps, and precision.fp8 asks for them: leave precision.fp8 "
            "out, or use engine=megatron"
        )
    _check_stage((config.deepspeed or DeepSpeed()).zero_optimization, config.precision.compute)


def check_engine_is_installed(config: Config) -> None:
    """Raise UsageError, in one sentence, where the run needs DeepSpeed and this Python does not have it."""
    if config.engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise no_deepspeed("it is not installed")


def no_deepspeed(why: str) -> UsageError:
    """What is told where DeepSpeed cannot be used."""
    return UsageError(
        f"engine=deepspeed needs DeepSpeed, which cannot be imported here ({why}): pip install 'trine[deepspeed]', or "
        "use engine=megatron"
    )


def _check_stage(zero: ZeroOptimization, compute: str) -> None:
    key = f"deepspeed.zero_optimization.stage={zero.stage}"
    if zero.stage == 0 and compute != "fp32":
        raise UsageError(
            f"{key} keeps no fp32 copies of parameters, and precision.compute={compute} needs them: use "
            "deepspeed.zero_optimization.stage=1 or more"
        )
    for name, stages in READ_AT.items():
        value = getattr(zero, name)
        if value is not None and zero.stage not in stages:
            raise UsageError(
                f"deepspeed.zero_optimization.{name} is read at stage {listed(stages)} alone, and {key}: change the "
                f"stage, or leave {name} out"
            )
    if zero.allgather_bucket_size is not None and zero.allgather_bucket_size % 2:
        raise UsageError(
            f"deepspeed.zero_optimization.allgather_bucket_size={zero.allgather_bucket_size} must be even: use "
            f"{nearest_multiples(zero.allgather_bucket_size, 2)}"
        )
    for name, least, offload in (("optimizer", 1, zero.offload_optimizer), ("param", 3, zero.offload_param)):
        if offload is not None and offload.device == "none" and offload.pin_memory:
            raise UsageError(
                f"deepspeed.zero_optimization.offload_{name}.pin_memory=true locks memory of the host, to which "
                "device=none moves nothing: set device=cpu, or leave it out"
            )
        if offload is not None and offload.device != "none" and zero.stage < least:
            raise UsageError(
                f"deepspeed.zero_optimization.offload_{name}.device={offload.device} needs stage {least} or more, and "
                f"{key}: raise the stage, or leave offload_{name} out"
            )
