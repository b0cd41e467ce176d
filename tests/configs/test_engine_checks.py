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
}

UNKNOWN = {
    "deepspeed.gradient_clipping=1": "deepspeed.gradient_clipping is what optimizer.clip_grad sets here: set that, and leave it out",
    "deepspeed.bf16={enabled: true}": "deepspeed.bf16 is what precision.compute sets here: set that, and leave it out",
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
        with pytest.raises(UsageError, match=rf"^deepspeed\.{key} is what {ours} sets here"):
            load(ENGINE, f"deepspeed.{key}=1")


def test_numbers_as_deepspeeds_users_write_them(load: Load) -> None:
    config = load(ENGINE, "deepspeed={zero_optimization: {stage: 2, reduce_bucket_size: 5.0e+8}}")
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
