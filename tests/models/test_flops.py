"""What each mixer says of its operations, against a count of what torch really multiplies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trine.configs.schema import Config
from trine.configs.stack import expand
from trine.models.block import Block
from trine.models.flops import layer_flops
from trine.models.sequences import Sequences
from trine.models.shared_kv import SharedKVProducer
from trine.models.site import Site
from trine.parallel.context import ContextParallel, SequenceShare

HIDDEN = 64
MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"heads": 4, "kv_heads": 2},
    "sliding_window": {"heads": 4, "window": 5},
    "differential": {"heads": 2, "kv_heads": 1},
    "differential_v2": {"heads": 4, "kv_heads": 2},
    "retention": {"heads": 2, "value_head_dim": 48},
    "gated_retention": {"heads": 2},
    "cross_attention": {"heads": 4},
    "differential_cross_attention": {"heads": 2},
}


@pytest.mark.parametrize("name", MIXERS)
def test_block_flops(
    name: str, config_for: Callable[..., Config], site_for: Callable[..., Site]
) -> None:
    """At one token the projections are nearly all there is, so tiles and masks do not blur the count: within 5 %."""
    config = config_for(
        hidden_size=HIDDEN,
        ffn_hidden_size=96,
        stack=[
            {"mixer": "attention", "layers": 1, "heads": 4},
            {"shared_kv": {"kv_heads": 4, "head_dim": 16}},
            {"mixer": name, "layers": 1, **MIXERS[name]},
            *([{"mixer": "cross_attention", "layers": 1, "heads": 4}] if "cross" not in name else []),
        ],
    )
    plan, site = expand(config.model.stack)[1], site_for(config)
    block = Block(plan, site)
    assert plan.shared_kv is not None
    kv = SharedKVProducer(plan.shared_kv, site)
    for parameter in [*block.parameters(), *kv.parameters()]:
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(1, 1, HIDDEN)
    one_token = Sequences(ContextParallel(SequenceShare(1), site.groups.cp))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shared = kv(x, one_token)
    assert kv.flops_per_token(plan.shared_kv, HIDDEN) == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(x, shared if plan.is_cross else None, one_token)
    expected = layer_flops(plan, config.model, 1) - (plan.produces is not None) * kv.flops_per_token(
        plan.shared_kv, HIDDEN
    )
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_attention_grows_with_the_mean_number_of_keys(config_for: Callable[..., Config]) -> None:
    config = config_for(hidden_size=HIDDEN, stack=[{"mixer": "attention", "layers": 1, "heads": 4}])
    (plan,) = expand(config.model.stack)
    # Scores and values: 2 * 2 operations per key and element, over (S + 1) / 2 keys.
    assert layer_flops(plan, config.model, 101) - layer_flops(plan, config.model, 1) == 4 * HIDDEN * 50
