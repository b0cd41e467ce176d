"""What 8-bit products cannot do with a model is refused in one sentence that says what would fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from trine.configs.checks import check_config
from trine.configs.errors import UsageError
from trine.configs.schema import Config

Load = Callable[..., Config]

SCALED = ["precision.compute=bf16", "precision.fp8={backend: scaled_mm}"]
TE = ["precision.compute=bf16", "precision.fp8={backend: te}"]
BLOCKS = ["precision.compute=bf16", "precision.fp8={backend: emulate, recipe: blockwise}"]
WIDE = ["model.hidden_size=512", "model.ffn_hidden_size=512", "model.stack.1.shared_kv.head_dim=128", "train.sequence_length=128"]
DIFFERENTIAL = "model.stack=[{mixer: differential, layers: 4, heads: 3, head_dim: 4}]"
ZIGZAG = "model.stack=[{mixer: attention, layers: 4, heads: 4}]"

MISTAKES: list[tuple[list[str], str]] = [
    (
        ["precision.fp8={backend: scaled_mm}"],
        "precision.fp8.backend=scaled_mm computes in bf16 beside its 8-bit products, and precision.compute=fp32: "
        "use precision.compute=bf16, or precision.fp8.backend=emulate",
    ),
    (
        ["precision.fp8={backend: te}"],
        "precision.fp8.backend=te computes in bf16 beside its 8-bit products, and precision.compute=fp32: "
        "use precision.compute=bf16, or precision.fp8.backend=emulate",
    ),
    (
        ["precision.fp8={backend: emulate, keep_first_last_bf16: 2}"],
        "precision.fp8.keep_first_last_bf16=2 leaves none of the 4 layers of model.stack in FP8: use at most 1",
    ),
    (
        [*SCALED, "model.ffn_hidden_size=72"],
        "model.ffn_hidden_size=72 is not a multiple of 16, as precision.fp8.backend=scaled_mm needs: use 64 or 80, "
        "or precision.fp8.backend=emulate",
    ),
    (
        [*SCALED, "parallel.tensor=2", "model.ffn_hidden_size=80"],
        "model.ffn_hidden_size=80 over parallel.tensor=2 is 40 per rank, which is not a multiple of 16, as "
        "precision.fp8.backend=scaled_mm needs: use 64 or 96, or precision.fp8.backend=emulate",
    ),
    (
        [*SCALED, DIFFERENTIAL],
        "the queries of model.stack.0 (differential) (24 wide) is not a multiple of 16, as "
        "precision.fp8.backend=scaled_mm needs: use 16 or 32, or precision.fp8.backend=emulate",
    ),
    (
        [*TE],
        "model.stack.0.heads=4, the width of its decay, is not a multiple of 16, as precision.fp8.backend=te needs: use "
        "16, or precision.fp8.backend=scaled_mm",
    ),
    (
        [*TE, "model.stack=[{mixer: differential_v2, layers: 4, heads: 24, head_dim: 16}]", "parallel.tensor=2"],
        "model.stack.0.heads=24, the width of its lambda, over parallel.tensor=2 is 12 per rank, which is not a multiple "
        "of 16, as precision.fp8.backend=te needs: use 32, or precision.fp8.backend=scaled_mm",
    ),
    (
        [*TE, "precision.fp8.recipe=delayed", "model.stack.0={mixer: retention, layers: 2, heads: 4}", "train.recompute=full"],
        "precision.fp8.recipe=delayed with precision.fp8.backend=te notes the magnitudes of recomputed layers twice, and "
        "train.recompute=full: use train.recompute=selective, or precision.fp8.recipe=tensorwise",
    ),
    (
        [*SCALED, "train.sequence_length=24"],
        "train.micro_batch_size=1 x train.sequence_length=24 is 24 tokens, which is not a multiple of 16, as "
        "precision.fp8.backend=scaled_mm needs: change one of the two, or precision.fp8.backend=emulate",
    ),
    (
        [*SCALED, ZIGZAG, "parallel.context=2", "train.sequence_length=32"],
        "train.micro_batch_size=1 x train.sequence_length=32 over 4 chunks of parallel.context=2 is 8 tokens, which is "
        "not a multiple of 16, as precision.fp8.backend=scaled_mm needs: change one of the two, or "
        "precision.fp8.backend=emulate",
    ),
    (
        [*BLOCKS],
        "model.hidden_size=64 is not a multiple of 128, as precision.fp8.recipe=blockwise needs: use 128, "
        "or precision.fp8.recipe=tensorwise",
    ),
    (
        [*BLOCKS, *WIDE, "train.sequence_length=64"],
        "train.micro_batch_size=1 x train.sequence_length=64 is 64 tokens, which is not a multiple of 128, as "
        "precision.fp8.recipe=blockwise needs: change one of the two, or precision.fp8.recipe=tensorwise",
    ),
    (
        ["precision.fp8={backend: emulate, recipe: mxfp8}", "train.sequence_length=48"],
        "train.micro_batch_size=1 x train.sequence_length=48 is 48 tokens, which is not a multiple of 32, as "
        "precision.fp8.recipe=mxfp8 needs: change one of the two, or precision.fp8.recipe=tensorwise",
    ),
]


@pytest.mark.parametrize(("overrides", "sentence"), MISTAKES)
def test_one_sentence(load: Load, overrides: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_config(load(*overrides))
    assert str(refused.value) == sentence


@pytest.mark.parametrize(
    "overrides",
    [
        SCALED,  # whose decay, 4 wide, is filled up with zeros
        ["precision.fp8={backend: emulate}", "model.ffn_hidden_size=72", "train.sequence_length=17"],
        ["precision.fp8={backend: emulate, recipe: delayed, keep_first_last_bf16: 1}"],
        [*BLOCKS, *WIDE],
        ["precision.fp8={backend: emulate, recipe: mxfp8}", *WIDE],
        [*TE, "model.stack.0={mixer: retention, layers: 2, heads: 4}"],
        [*TE, "model.stack.0={mixer: retention, layers: 2, heads: 4}", "train.recompute=full"],
        ["precision.fp8={backend: emulate, recipe: delayed}", "train.recompute=full"],
        [*SCALED, "train.sequence_length=32", "train.sequence_ramp=[{until_samples: 8, sequence_length: 4}]"],
        ["precision.fp8.backend=emulate", "precision.fp8.shadow_interval=7"],
    ],
)
def test_what_fits_is_accepted(load: Load, overrides: list[str]) -> None:
    check_config(load(*overrides))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("precision.fp8={backend: fp8}", "precision.fp8.backend=fp8 is not one of te, scaled_mm, emulate"),
        ("precision.fp8={backend: te, recipe: tensor}", "precision.fp8.recipe=tensor is not one of delayed, tensorwise, blockwise, mxfp8"),
        ("precision.fp8={backend: te, recip: x}", "precision.fp8.recip is not a key; did you mean precision.fp8.recipe?"),
        ("precision.fp8={recipe: delayed}", "precision.fp8.backend is missing, and it has no default"),
        ("precision.fp8=true", "precision.fp8=true must be a section of keys"),
        ("precision.fp8={backend: te, shadow_interval: -1}", "precision.fp8.shadow_interval=-1 must be at least 0"),
    ],
)  # fmt: skip
def test_mistakes_in_the_keys(load: Load, override: str, sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        load(override)
    assert str(refused.value) == sentence


def test_off_by_default(load: Load) -> None:
    assert load().precision.fp8 is None


@pytest.mark.parametrize(("kept", "covered"), [(0, [0, 1, 2, 3, 4]), (1, [1, 2, 3]), (2, [2])])
def test_layers_at_both_ends_are_kept(load: Load, kept: int, covered: list[int]) -> None:
    fp8 = load(f"precision.fp8={{backend: emulate, keep_first_last_bf16: {kept}}}").precision.fp8
    assert fp8 is not None
    assert [layer for layer in range(5) if fp8.covers(layer, 5)] == covered
