"""Whether ``engine: deepspeed`` fits the rest of a configuration. Whether it is installed is checked on the ranks."""

from __future__ import annotations

import importlib.util

from .errors import UsageError
from .schema import Config, DeepSpeed, ZeroOptimization

SET_ELSEWHERE = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "gradient_clipping": "optimizer.clip_grad",
    "fp16": "precision.compute",
    "bf16": "precision.compute",
    "amp": "precision.compute",
    "torch_autocast": "precision.compute",
    "data_types": "precision.compute",
    "activation_checkpointing": "train.recompute",
    "tensor_parallel": "parallel.tensor",
    "pipeline": "parallel.pipeline",
    "sequence_parallel_size": "parallel.context",
    "checkpoint": "checkpoint",
    "elasticity": "parallel",
    "seed": "train.seed",
    "data_efficiency": "train.sequence_ramp",
    "curriculum_learning": "train.sequence_ramp",
}
"""Keys of DeepSpeed's own configuration that are no keys of ``deepspeed``, and what decides the same here."""


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
    for name, least, offload in (("optimizer", 1, zero.offload_optimizer), ("param", 3, zero.offload_param)):
        if offload is not None and offload.device != "none" and zero.stage < least:
            raise UsageError(
                f"deepspeed.zero_optimization.offload_{name}.device={offload.device} needs stage {least} or more, and "
                f"{key}: raise the stage, or leave offload_{name} out"
            )
