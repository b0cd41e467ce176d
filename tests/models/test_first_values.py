"""First values follow the laws that the papers' code uses, with the full fans of each projection."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from trine.configs.schema import Config
from trine.models.build import build_chunks
from trine.parallel.parameters import blueprint_of, global_names, section_name
from trine.parallel.topology import Topology

HIDDEN, FFN = 96, 160
STACK = [
    {"mixer": "attention", "layers": 1, "heads": 4, "kv_heads": 2},
    {"mixer": "differential", "layers": 1, "heads": 2},
    {"mixer": "differential_v2", "layers": 1, "heads": 4},
    {"mixer": "retention", "layers": 1, "heads": 2, "value_head_dim": 80},
    {"mixer": "gated_retention", "layers": 1, "heads": 2},
    {"shared_kv": {"kv_heads": 2, "head_dim": 24}},
    {"mixer": "differential_cross_attention", "layers": 1, "heads": 2},
]


def uniform(bound: float) -> float:
    return bound / math.sqrt(3)


def linear(fan_in: int) -> float:
    return uniform(fan_in**-0.5)


def xavier(fan_in: int, fan_out: int, gain: float) -> float:
    return uniform(gain * math.sqrt(6 / (fan_in + fan_out)))


DEVIATIONS = {
    "embedding.weight": HIDDEN**-0.5,
    "output.weight": linear(HIDDEN),
    "layers.0.mixer.input.query": linear(HIDDEN),
    "layers.0.mixer.input.key": linear(HIDDEN),
    "layers.0.mixer.output.weight": linear(HIDDEN),
    "layers.0.feed_forward.input.fc1": linear(HIDDEN),
    "layers.0.feed_forward.input.gate": linear(HIDDEN),
    "layers.0.feed_forward.fc2.weight": linear(FFN),
    "layers.1.mixer.input.value": linear(HIDDEN),
    "layers.2.mixer.input.lambda": linear(HIDDEN),
    "layers.3.mixer.input.query": xavier(HIDDEN, HIDDEN, 2**-2.5),
    "layers.3.mixer.input.value": xavier(HIDDEN, 160, 2**-2.5),
    "layers.3.mixer.input.gate": xavier(HIDDEN, 160, 2**-2.5),
    "layers.3.mixer.output.weight": xavier(160, HIDDEN, 0.5),
    "layers.4.mixer.input.query": xavier(HIDDEN, HIDDEN, 2**-2.5),
    "layers.4.mixer.input.decay": xavier(HIDDEN, 2, 2**-2.5),
    "layers.4.mixer.output.weight": xavier(HIDDEN, HIDDEN, 0.5),
    "layers.5.mixer.output.weight": linear(HIDDEN),
    "shared_kv.5.input.key": linear(HIDDEN),
}


@pytest.fixture
def values(config_for: Callable[..., Config], one_rank: Topology) -> dict[str, torch.Tensor]:
    config = config_for(hidden_size=HIDDEN, ffn_hidden_size=FFN, stack=STACK, vocabulary_size=256)
    (model,) = build_chunks(config, one_rank)
    found = {}
    for prefix, parameter in global_names(model, model.global_name):
        blueprint = blueprint_of(parameter)
        for section, block in zip(blueprint.sections, parameter.split(blueprint.local_rows(1)), strict=True):
            found[section_name(prefix, section)] = block.detach()
    return found


@pytest.mark.parametrize("name", DEVIATIONS)
def test_deviation(values: dict[str, torch.Tensor], name: str) -> None:
    """Within four standard errors of a sample deviation, which are at most 4 / sqrt(2 n)."""
    sample = values[name]
    assert sample.std().item() == pytest.approx(DEVIATIONS[name], rel=4 / math.sqrt(2 * sample.numel()))
    assert abs(sample.mean().item()) < 5 * DEVIATIONS[name] / math.sqrt(sample.numel())


def test_lambda_vectors_and_norms(values: dict[str, torch.Tensor]) -> None:
    vectors = torch.cat([v for name, v in values.items() if "lambda_" in name])
    assert vectors.numel() == 8 * 24
    assert vectors.std().item() == pytest.approx(0.1, rel=4 / math.sqrt(2 * vectors.numel()))
    norms = [v for name, v in values.items() if "norm" in name]
    assert len(norms) == 2 * 6 + 1 + 1 + 2
    assert all(torch.equal(v, torch.ones_like(v)) for v in norms)
