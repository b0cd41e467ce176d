"""Cross mixers on shared K,V against the self mixers that are held to the authors' tensors.

Given the same projections, and K,V made from the same hidden states, they must compute the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trine.configs.schema import Config
from trine.configs.stack import expand
from trine.models.registry import build_mixer
from trine.models.sequences import Sequences
from trine.models.shared_kv import SharedKVProducer
from trine.models.site import Site
from trine.parallel.context import ContextParallel, SequenceShare

HIDDEN, LENGTH = 48, 21
ROPE = {"theta": 500.0, "spacing": "linspace"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "cross_attention": (
        {"mixer": "attention", "layers": 1, "heads": 6, "kv_heads": 2, "head_dim": 10, "rope": ROPE},
        {"kv_heads": 2, "head_dim": 10, "rope": ROPE},
        {"mixer": "cross_attention", "layers": 1, "heads": 6},
    ),
    # A pair of the self mixer has two key heads of width d and one value head of width 2d: in the shared K,V two heads
    # of each.
    "differential_cross_attention": (
        {"mixer": "differential", "layers": 1, "heads": 6, "kv_heads": 2, "head_dim": 10, "rope": ROPE},
        {"kv_heads": 4, "head_dim": 10, "rope": ROPE},
        {"mixer": "differential_cross_attention", "layers": 1, "heads": 6},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_self_mixer(name: str, config_for: Callable[..., Config], site_for: Callable[..., Site]) -> None:
    own, shared, cross = CASES[name]
    config = config_for(hidden_size=HIDDEN, norm_eps=1e-12, stack=[own, {"shared_kv": shared}, cross])
    plan, cross_plan = expand(config.model.stack)
    site = site_for(config)
    self_mixer, cross_mixer = build_mixer(plan, site), build_mixer(cross_plan, site)
    assert cross_plan.shared_kv is not None
    producer = SharedKVProducer(cross_plan.shared_kv, site)
    generator = torch.Generator().manual_seed(0)
    for parameter in self_mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    queries, keys_values = torch.split(
        self_mixer.input.weight.detach(), [cross_mixer.input.weight.shape[0], producer.input.weight.shape[0]]
    )
    taken = {"input.weight": queries}
    cross_mixer.load_state_dict(self_mixer.state_dict() | taken)
    producer.load_state_dict({"norm.weight": torch.ones(HIDDEN), "input.weight": keys_values})
    x = torch.randn(LENGTH, 2, HIDDEN, generator=generator)
    x = x * x.square().mean(-1, keepdim=True).rsqrt()  # already normed, as the producer's norm must change nothing
    sequences = Sequences(ContextParallel(SequenceShare(LENGTH), site.groups.cp))
    expected = self_mixer(x, None, sequences)
    torch.testing.assert_close(cross_mixer(x, producer(x, sequences), sequences), expected, atol=1e-5, rtol=1e-5)
