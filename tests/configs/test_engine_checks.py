"""What ``engine: deepspeed`` refuses, each in one sentence that names the keys."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest

from trine.configs.checks import check_config
from trine.configs.engine_checks import SET_ELSEWHERE, check_engine_is_installed
from trine.configs.errors import UsageError
from trine.configs.schema import Config

Load = Callable[..., Config]

ENGINE = "engine=deepspeed"

REFUSED = {
    "deepspeed={}": "deepspeed has settings, and engine=megatron reads none of them: set engine=deepspeed",
    f"{ENGINE} parallel.pipeline=2": "engine=deepspeed has no pipeline stages, and parallel.pipeline=2: use parallel.pipeline=1 with a larger parallel.tensor or a higher deepspeed.zero_optimization.stage, or engine=megatron",
    f"{ENGINE} precision.fp8={{backend:emulate}}": "engine=deepspeed does not have 8-bit linear maps, and precision.fp8 asks for them: leave precision.fp8 out, or use engine=megatron",
    f"{ENGINE} precision.compute=bf16 deepspeed.zero_optimization.stage=0": "deepspeed.zero_optimization.stage=0 keeps no fp32 copies of parameters, and precision.compute=bf16 needs them: use deepspeed.zero_optimization.stage=1 or more",
    f"{ENGINE} deepspeed.zero_optimization={{stage:0,offload_optimizer:{{device:cpu}}}}": "deepspeed.zero_optimization.offload_optimizer.device=cpu needs stage 1 or more, and deepspeed.zero_optimization.stage=0: raise the stage, or leave offload_optimizer out",
    f"{ENGINE} deepspeed.zero_optimization={{stage:2,offload_param:{{device:cpu}}}}": "deepspeed.zero_optimization.offload_param.device=cpu needs stage 3 or more, and deepspeed.zero_optimization.stage=2: raise the stage, or leave offload_param out",
    f"{ENGINE} deepspeed.zero_optimization={{stage:1,sub_group_size:9}}": "deepspeed.zero_optimization.sub_group_size is read at stage 3 alone, and deepspeed.zero_optimization.stage=1: change the stage, or leave sub_group_size out",
    f"{ENGINE} deepspeed.zero_optimization={{stage:2,allgather_bucket_size:63}}": "deepspeed.zero_optimization.allgather_bucket_size=63 must be even: use 62 or 64",
    f"{ENGINE} deepspeed.zero_optimization.offload_optimizer.pin_memory=true": "deepspeed.zero_optimization.offload_optimizer.pin_memory=true locks memory of the host, to which device=none moves nothing: set device=cpu, or leave it out",
}

UNKNOWN = {
    "deepspeed.gradient_clipping=1": "deepspeed.gradient_clipping is what optimizer.clip_grad sets here: set that, and leave it out",
    "deepspeed.bf16={enabled: true}": "deepspeed.bf16 is what precision.compute sets here: set that, and leave it out",
    "deepspeed.zero_optimization.cpu_offload=true": "deepspeed.zero_optimization.cpu_offload is what deepspeed.zero_optimization.offload_optimizer.device sets here: set that, and leave it out",
    "deepspeed.zero_optimization.zero_hpz_partition_size=8": "deepspeed.zero_optimization.zero_hpz_partition_size is a setting of DeepSpeed's that trine does not pass on: leave it out",
    "deepspeed.steps_per_print=10": "deepspeed.steps_per_print is a setting of DeepSpeed's that trine does not pass on: leave it out",
    "deepspeed.zero_optimisation={stage: 1}": "deepspeed.zero_optimisation is not a key; did you mean deepspeed.zero_optimization?",
    "deepspeed.zero_optimization.stage=4": "deepspeed.zero_optimization.stage=4 must be at most 3",
    "deepspeed.zero_optimization.offload_optimizer.device=nvme": "deepspeed.zero_optimization.offload_optimizer.device=nvme is not one of none, cpu",
    "deepspeed.zero_optimization.reduce_bucket_size=auto": "deepspeed.zero_optimization.reduce_bucket_size=auto must be a whole number",
    "engine=deepsped": "engine=deepsped is not one of megatron, deepspeed; did you mean deepspeed?",
}


@pytest.mark.parametrize(("words", "sentence"), REFUSED.items())
def test_what_does_not_fit(load: Load, words: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_config(load(*(word.replace(":", ": ") for word in words.split())))
    assert str(caught.value) == sentence


@pytest.mark.parametrize(("word", "sentence"), UNKNOWN.items())
def test_what_is_no_setting(load: Load, word: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(ENGINE, word)
    assert str(caught.value) == sentence


def test_every_key_of_deepspeed_that_is_set_elsewhere_is_refused_by_name(load: Load) -> None:
    for key, ours in SET_ELSEWHERE.items():
        with pytest.raises(UsageError, match=rf"^{key} is what {ours} sets here"):
            load(ENGINE, f"{key}=1")


@pytest.mark.parametrize("number", ["5.0e+8", "5e8", "5E8", "500000000"])
def test_numbers_as_deepspeeds_users_write_them(load: Load, number: str) -> None:
    config = load(ENGINE, f"deepspeed={{zero_optimization: {{stage: 2, reduce_bucket_size: {number}}}}}")
    check_config(config)
    assert config.deepspeed is not None
    assert config.deepspeed.zero_optimization.reduce_bucket_size == 500_000_000
    assert config.zero_stage == 2
    assert load(ENGINE).zero_stage == 1


def test_without_deepspeed_nothing_is_started(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_engine_is_installed(load())
    with pytest.raises(UsageError) as caught:
        check_engine_is_installed(load(ENGINE))
    assert str(caught.value) == (
        "engine=deepspeed needs DeepSpeed, which cannot be imported here (it is not installed): "
        "pip install 'trine[deepspeed]', or use engine=megatron"
    )
