"""The closed form counts the matrices that the papers name."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from trine.configs.errors import UsageError
from trine.configs.parameters import count_parameters
from trine.configs.schema import Config

Load = Callable[..., Config]
Shapes = list[tuple[int, ...]]

D, F = 64, 128

# Each mixer's weights as (outputs, inputs), at sizes where no two counts coincide.
MIXERS: dict[str, Shapes] = {
    "{mixer: attention, heads: 6, kv_heads: 3, head_dim: 10}": [(60, D), (30, D), (30, D), (D, 60)],
    "{mixer: sliding_window, heads: 6, window: 5, head_dim: 10}": [(60, D), (60, D), (60, D), (D, 60)],
    "{mixer: differential, heads: 4}": [(D, D), (D, D), (D, D), (D, D), (8,), (8,), (8,), (8,), (16,)],
    "{mixer: differential, heads: 6, kv_heads: 3, head_dim: 10}": [
        (120, D), (60, D), (60, D), (D, 120), (10,), (10,), (10,), (10,), (20,),
    ],
    "{mixer: differential_v2, heads: 6, kv_heads: 3, head_dim: 10}": [(120, D), (30, D), (30, D), (D, 60), (6, D)],
    "{mixer: retention, heads: 4}": [(D, D), (D, D), (D, D), (D, D), (D, D)],
    "{mixer: retention, heads: 6, head_dim: 10, value_head_dim: 7}": [(60, D), (60, D), (42, D), (42, D), (D, 42)],
    "{mixer: gated_retention, heads: 6, head_dim: 10}": [(60, D), (60, D), (60, D), (60, D), (D, 60), (6, D)],
}  # fmt: skip
CROSS_MIXERS: dict[str, Shapes] = {
    "{mixer: cross_attention, heads: 6}": [(72, D), (D, 72)],
    "{mixer: differential_cross_attention, heads: 6}": [
        (144, D),
        (D, 144),
        (12,),
        (12,),
        (12,),
        (12,),
        (24,),
    ],
}
FFN = {"swiglu": [(F, D), (F, D), (D, F)], "gelu": [(F, D), (D, F)]}
SHARED_KV = "{shared_kv: {kv_heads: 2, head_dim: 12}}"


def numbers(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize("activation", FFN)
@pytest.mark.parametrize(("segment", "shapes"), MIXERS.items())
def test_a_stack_of_one_mixer(load: Load, segment: str, shapes: Shapes, activation: str) -> None:
    model = load(
        f"model.stack=[{segment[:-1]}, layers: 3}}]",
        f"model.ffn_activation={activation}",
        "model.vocabulary_size=100",
    ).model
    count = count_parameters(model)
    layer = numbers([*shapes, *FFN[activation], (D,), (D,)])
    assert count.non_embedding == 3 * layer + D
    assert count.embedding == 2 * 128 * D
    assert count.total == count.embedding + count.non_embedding


@pytest.mark.parametrize(("segment", "shapes"), CROSS_MIXERS.items())
def test_a_cross_decoder_on_its_shared_kv(load: Load, segment: str, shapes: Shapes) -> None:
    stack = f"model.stack=[{SHARED_KV}, {segment[:-1]}, layers: 3}}]"
    model = load(stack, "model.vocabulary_size=256", "model.tied_embeddings=true").model
    count = count_parameters(model)
    layer = numbers([*shapes, *FFN["swiglu"], (D,), (D,)])
    shared = numbers([(D,), (24, D), (24, D)])
    assert count.non_embedding == shared + 3 * layer + D
    assert count.embedding == 256 * D


def test_the_vocabulary_must_be_known(load: Load) -> None:
    with pytest.raises(UsageError, match="^model.vocabulary_size is not known: set it, or prepare the data"):
        count_parameters(load().model)
