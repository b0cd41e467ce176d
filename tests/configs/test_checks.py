"""Numbers that do not fit together are refused in one sentence that says what would fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from trine.configs.checks import Layout, check_config, check_layout
from trine.configs.errors import UsageError
from trine.configs.schema import Config

Load = Callable[..., Config]

DIFFERENTIAL_CROSS = "model.stack.2={mixer: differential_cross_attention, layers: 2, heads: 4}"
ATTENTION = "model.stack=[{mixer: attention, layers: 4, heads: 4}]"
DIFFERENTIAL = "model.stack=[{mixer: differential, layers: 4, heads: 4}]"
RETENTION = "model.stack=[{mixer: retention, layers: 4, heads: 4}]"
TWO_SHARED = (
    "model.stack=[{shared_kv: {kv_heads: 2, head_dim: 8}}, {shared_kv: {kv_heads: 2, head_dim: 8}}, "
    + ("{mixer: cross_attention, layers: 2, heads: 4}]")
)
ONLY_SHARED = "model.stack=[{shared_kv: {kv_heads: 2, head_dim: 8}}]"

MISTAKES: list[tuple[list[str], str]] = [
    # the order of the stack
    (
        ["model.stack=[{mixer: cross_attention, layers: 1, heads: 4}]"],
        (
            "model.stack.0 is cross_attention, which reads a shared_kv, and none comes before it: "
            "put a shared_kv segment there"
        ),
    ),
    (
        ["model.stack.2.mixer=attention"],
        (
            "model.stack.1.shared_kv is read by no layer: put cross_attention or differential_cross_attention "
            "after it, or remove it"
        ),
    ),
    (
        [TWO_SHARED],
        (
            "model.stack.0.shared_kv is read by no layer: put cross_attention or differential_cross_attention after it, "
            "or remove it"
        ),
    ),
    ([ONLY_SHARED], "model.stack has no layers: give it at least one segment with a mixer"),
    # heads and widths
    (
        ["model.stack.0.heads=6"],
        (
            "model.hidden_size=64 cannot be divided into model.stack.0.heads=6 heads of one even width: "
            "set model.stack.0.head_dim, or model.stack.0.heads to one of 1, 2, 4, 8"
        ),
    ),
    (
        ["model.stack.0.heads=64"],
        (
            "model.hidden_size=64 cannot be divided into model.stack.0.heads=64 heads of one even width: "
            "set model.stack.0.head_dim, or model.stack.0.heads to one of 4, 8, 16, 32"
        ),
    ),
    (
        [DIFFERENTIAL, "model.stack.0.heads=32"],
        (
            "model.hidden_size=64 cannot be divided into model.stack.0.heads=32 pairs of heads of one even width: "
            "set model.stack.0.head_dim, or model.stack.0.heads to one of 2, 4, 8, 16"
        ),
    ),
    (
        ["model.hidden_size=65", "model.stack.0.heads=5"],
        (
            "model.hidden_size=65 cannot be divided into model.stack.0.heads=5 heads of one even width: "
            "set model.stack.0.head_dim"
        ),
    ),
    (
        ["model.stack.0.head_dim=15"],
        "model.stack.0.head_dim=15 is odd, and rotary position embedding turns pairs of dimensions: use 14 or 16",
    ),
    (
        ["model.stack.1.shared_kv.head_dim=1"],
        "model.stack.1.shared_kv.head_dim=1 is odd, and rotary position embedding turns pairs of dimensions: use 2",
    ),
    (
        [ATTENTION, "model.stack.0.heads=8", "model.stack.0.kv_heads=3"],
        "model.stack.0.kv_heads=3 does not divide model.stack.0.heads=8: use one of 1, 2, 4, 8",
    ),
    (
        [ATTENTION, "model.stack.0.mixer=differential_v2", "model.stack.0.kv_heads=8"],
        "model.stack.0.kv_heads=8 does not divide model.stack.0.heads=4: use one of 1, 2, 4",
    ),
    (
        ["model.stack.2.heads=6"],
        (
            "model.stack.2.heads=6 is not a multiple of the K,V heads it reads (model.stack.1.shared_kv.kv_heads=4): "
            "use 4 or 8"
        ),
    ),
    (
        ["model.stack.2.head_dim=32"],
        (
            "model.stack.2.head_dim=32 is not model.stack.1.shared_kv.head_dim=16, the width that its queries must have: "
            "leave it out"
        ),
    ),
    (
        [DIFFERENTIAL_CROSS, "model.stack.1.shared_kv.kv_heads=3"],
        (
            "model.stack.1.shared_kv.kv_heads=3 is odd, and model.stack.2 (differential_cross_attention) takes K,V heads "
            "in pairs: use 2 or 4"
        ),
    ),
    (
        [DIFFERENTIAL_CROSS, "model.stack.2.heads=1"],
        (
            "model.stack.2.heads=1 is not a multiple of the K,V heads it reads (model.stack.1.shared_kv.kv_heads=4, "
            "which is 2 pairs): use 2"
        ),
    ),
    # tensor parallelism
    (
        ["parallel.tensor=3"],
        (
            "model.stack.0.heads=4 cannot be divided over parallel.tensor=3: "
            "the tensor sizes that fit this model are 1, 2, 4"
        ),
    ),
    (
        ["model.stack.1.shared_kv.kv_heads=2", "parallel.tensor=4"],
        (
            "model.stack.1.shared_kv.kv_heads=2 cannot be divided over parallel.tensor=4: "
            "the tensor sizes that fit this model are 1, 2"
        ),
    ),
    (
        [DIFFERENTIAL_CROSS, "parallel.tensor=4"],
        (
            "model.stack.1.shared_kv.kv_heads=4 (2 pairs) cannot be divided over parallel.tensor=4: "
            "the tensor sizes that fit this model are 1, 2"
        ),
    ),
    (
        [DIFFERENTIAL_CROSS, "model.stack.1.shared_kv.kv_heads=2", "parallel.tensor=2"],
        (
            "model.stack.1.shared_kv.kv_heads=2 (1 pair) cannot be divided over parallel.tensor=2: "
            "the tensor sizes that fit this model are 1"
        ),
    ),
    (
        [ATTENTION, "model.stack.0.kv_heads=2", "parallel.tensor=4"],
        (
            "model.stack.0.kv_heads=2 cannot be divided over parallel.tensor=4: "
            "the tensor sizes that fit this model are 1, 2"
        ),
    ),
    (
        ["model.ffn_hidden_size=129", "parallel.tensor=2"],
        "model.ffn_hidden_size=129 cannot be divided over parallel.tensor=2: the tensor sizes that fit this model are 1",
    ),
    (
        ["model.vocabulary_size=100", "model.vocabulary_multiple=3", "parallel.tensor=4"],
        (
            "model.vocabulary_size=100 (padded to 102) cannot be divided over parallel.tensor=4: "
            "the tensor sizes that fit this model are 1, 2"
        ),
    ),
    # sequence, context and pipeline parallelism
    (
        ["parallel.sequence=true"],
        (
            "parallel.sequence=true splits activations over the tensor ranks, and parallel.tensor=1 has only one: "
            "turn it off or raise parallel.tensor"
        ),
    ),
    (
        ["parallel.sequence=true", "parallel.tensor=4", "train.sequence_length=18"],
        (
            "train.sequence_length=18 cannot be divided over parallel.tensor=4, which parallel.sequence=true needs: "
            "use 16 or 20"
        ),
    ),
    (
        ["parallel.context=4", "train.sequence_length=20"],
        (
            "train.sequence_length=20 cannot be divided over parallel.context=4 into two chunks per rank, which balance "
            "mixers that see the whole past: use 16 or 24"
        ),
    ),
    (
        ["parallel.context=2", "parallel.tensor=4", "parallel.sequence=true", "train.sequence_length=18"],
        (
            "train.sequence_length=18 cannot be divided over parallel.context=2 into two chunks per rank, which balance "
            "mixers that see the whole past: use 16 or 24"
        ),
    ),
    (
        [RETENTION, "parallel.context=4", "train.sequence_length=3"],
        "train.sequence_length=3 cannot be divided over parallel.context=4: use 4",
    ),
    (
        ["parallel.context=2", "parallel.tensor=4", "parallel.sequence=true", "train.sequence_length=20"],
        (
            "train.sequence_length=20 cannot be divided over parallel.context=2 and then over parallel.tensor=4, which "
            "parallel.sequence=true needs: use 16 or 24"
        ),
    ),
    (
        [RETENTION, "parallel.context=3", "parallel.tensor=4", "parallel.sequence=true", "train.sequence_length=15"],
        (
            "train.sequence_length=15 cannot be divided over parallel.context=3 and then over parallel.tensor=4, which "
            "parallel.sequence=true needs: use 12 or 24"
        ),
    ),
    (
        [ATTENTION, "parallel.context=8", "parallel.context_exchange=all_to_all"],
        (
            "model.stack.0.heads=4 over parallel.tensor=1 is 4 per rank, which parallel.context_exchange=all_to_all "
            "cannot deal out over parallel.context=8: use parallel.context_exchange=gather, or one of the context sizes "
            "that fit this model: 1, 2, 4"
        ),
    ),
    (
        [DIFFERENTIAL, "parallel.tensor=2", "parallel.context=4", "parallel.context_exchange=all_to_all"],
        (
            "model.stack.0.heads=4 over parallel.tensor=2 is 2 per rank, which parallel.context_exchange=all_to_all "
            "cannot deal out over parallel.context=4: use parallel.context_exchange=gather, or one of the context sizes "
            "that fit this model: 1, 2"
        ),
    ),
    (
        [
            ATTENTION,
            "model.stack.0.mixer=differential_v2",
            "model.stack.0.kv_heads=2",
            "parallel.tensor=2",
            "parallel.context=2",
            "parallel.context_exchange=all_to_all",
        ],
        (
            "model.stack.0.kv_heads=2 over parallel.tensor=2 is 1 per rank, which parallel.context_exchange=all_to_all "
            "cannot deal out over parallel.context=2: use parallel.context_exchange=gather, or one of the context sizes "
            "that fit this model: 1"
        ),
    ),
    (
        ["parallel.pipeline=5"],
        (
            "the 4 layers of model.stack are fewer than the chunks of parallel.pipeline=5, each of which holds at least "
            "one: use 4 chunks or fewer"
        ),
    ),
    (
        ["parallel.pipeline=2", "parallel.virtual_pipeline=4", "parallel.pipeline_split=even"],
        (
            "the 4 layers of model.stack are fewer than the chunks of parallel.pipeline=2 x parallel.virtual_pipeline=4 "
            "= 8, each of which holds at least one: use 4 chunks or fewer"
        ),
    ),
    (
        ["parallel.pipeline=3", "parallel.pipeline_split=even"],
        (
            "the 4 layers of model.stack cannot be divided over parallel.pipeline=3 with parallel.pipeline_split=even: "
            "use parallel.pipeline_split=balanced, or one of the numbers that divide them: 1, 2, 4"
        ),
    ),
    (
        ["parallel.pipeline=3", "parallel.virtual_pipeline=2", "model.stack.0.layers=6", "parallel.pipeline_split=even"],
        (
            "the 8 layers of model.stack cannot be divided over parallel.pipeline=3 x parallel.virtual_pipeline=2 = 6 "
            "with parallel.pipeline_split=even: use parallel.pipeline_split=balanced, or one of the numbers that divide "
            "them: 1, 2, 4, 8"
        ),
    ),
    (
        ["parallel.pipeline=3", "parallel.pipeline_split=[2, 2]"],
        (
            "parallel.pipeline_split=[2, 2] puts 4 layers into 2 chunks, and model.stack has 4 layers for the 3 chunks of "
            "parallel.pipeline=3: use for example [2, 1, 1], or balanced"
        ),
    ),
    (
        ["parallel.pipeline=2", "parallel.pipeline_split=[3, 5]"],
        (
            "parallel.pipeline_split=[3, 5] puts 8 layers into 2 chunks, and model.stack has 4 layers for the 2 chunks of "
            "parallel.pipeline=2: use for example [2, 2], or balanced"
        ),
    ),
    (
        [
            "parallel.pipeline=2",
            "parallel.virtual_pipeline=2",
            "model.stack.0.layers=3",
            "parallel.pipeline_split=[]",
        ],
        (
            "parallel.pipeline_split=[] puts 0 layers into 0 chunks, and model.stack has 5 layers for the 4 chunks of "
            "parallel.pipeline=2 x parallel.virtual_pipeline=2 = 4: use for example [2, 1, 1, 1], or balanced"
        ),
    ),
    (
        ["parallel.virtual_pipeline=2"],
        (
            "parallel.virtual_pipeline=2 interleaves pipeline stages, and parallel.pipeline=1 has only one: "
            "raise parallel.pipeline or use parallel.virtual_pipeline=1"
        ),
    ),
    # training
    (["train.sequence_length=1"], "train.sequence_length=1 leaves no token to predict: use 2 or more"),
    (["optimizer.warmup_steps=100"], "optimizer.warmup_steps=100 must be less than train.steps=100: use for example 10"),
    (
        ["optimizer.warmup_steps=10", "optimizer.decay_steps=10"],
        "optimizer.warmup_steps=10 must be less than optimizer.decay_steps=10: use for example 1",
    ),
    (
        ["optimizer.minimum_learning_rate=1e-3"],
        "optimizer.minimum_learning_rate=0.001 must not be above optimizer.learning_rate=0.0003",
    ),
    (
        ["optimizer.schedule=wsd", "optimizer.wsd_decay_steps=101"],
        "optimizer.wsd_decay_steps=101 must not be above train.steps=100",
    ),
    (
        ["optimizer.schedule=wsd", "optimizer.wsd_decay_steps=51", "optimizer.decay_steps=50"],
        "optimizer.wsd_decay_steps=51 must not be above optimizer.decay_steps=50",
    ),
]

LAYOUT_MISTAKES: list[tuple[list[str], int, str]] = [
    (
        ["parallel.tensor=2", "parallel.pipeline=2"],
        6,
        (
            "a world size of 6 is not a multiple of parallel.tensor=2 x parallel.pipeline=2 x parallel.context=1 = 4: "
            "start 4 or 8 ranks, or divide the model otherwise"
        ),
    ),
    (
        ["parallel.pipeline=2"],
        1,
        (
            "a world size of 1 is not a multiple of parallel.tensor=1 x parallel.pipeline=2 x parallel.context=1 = 2: "
            "start 2 ranks, or divide the model otherwise"
        ),
    ),
    (
        [],
        0,
        (
            "a world size of 0 is not a multiple of parallel.tensor=1 x parallel.pipeline=1 x parallel.context=1 = 1: "
            "start 1 ranks, or divide the model otherwise"
        ),
    ),
    (
        ["train.global_batch_size=9", "train.micro_batch_size=2"],
        2,
        (
            "train.global_batch_size=9 is not a multiple of train.micro_batch_size=2 x 2 data-parallel ranks = 4: "
            "use 8 or 12"
        ),
    ),
    (
        [],
        16,
        "train.global_batch_size=8 is not a multiple of train.micro_batch_size=1 x 16 data-parallel ranks = 16: use 16",
    ),
    (
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.global_batch_size=6"],
        4,
        (
            "train.global_batch_size=6 makes 3 microbatches per rank, and parallel.virtual_pipeline=2 needs a multiple of "
            "parallel.pipeline=2: use 4 or 8"
        ),
    ),
    (
        ["parallel.tensor=2", "parallel.context=2"],
        6,
        (
            "a world size of 6 is not a multiple of parallel.tensor=2 x parallel.pipeline=1 x parallel.context=2 = 4: "
            "start 4 or 8 ranks, or divide the model otherwise"
        ),
    ),
]


@pytest.mark.parametrize(("overrides", "sentence"), MISTAKES)
def test_numbers_that_do_not_fit(load: Load, overrides: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_config(load(*overrides))
    assert str(caught.value) == sentence


@pytest.mark.parametrize(("overrides", "world_size", "sentence"), LAYOUT_MISTAKES)
def test_ranks_that_do_not_fit(load: Load, overrides: list[str], world_size: int, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_layout(load(*overrides), world_size)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.tensor=4", "parallel.sequence=true"],
        ["parallel.pipeline=4"],
        ["parallel.pipeline=3"],
        ["parallel.pipeline=2", "parallel.pipeline_split=even"],
        ["parallel.pipeline=2", "parallel.pipeline_split=[3, 1]"],
        ["parallel.pipeline_split=[4]"],
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.pipeline_split=[1, 1, 1, 1]"],
        ["parallel.context=8"],
        [RETENTION, "parallel.context=16"],
        [RETENTION, "parallel.context=4", "train.sequence_length=20"],
        ["parallel.context=2", "parallel.tensor=4", "parallel.sequence=true"],
        ["parallel.context=2", "parallel.tensor=4", "train.sequence_length=20"],
        [ATTENTION, "parallel.context_exchange=all_to_all", "parallel.tensor=4"],
        [ATTENTION, "parallel.context_exchange=all_to_all", "parallel.context=4"],
        [ATTENTION, "parallel.context_exchange=all_to_all", "parallel.context=2", "parallel.tensor=2"],
        ["parallel.context_exchange=all_to_all", "parallel.context=8"],
        [
            ATTENTION,
            "model.stack.0.mixer=sliding_window",
            "model.stack.0.window=3",
            "parallel.context_exchange=all_to_all",
            "parallel.context=8",
        ],
        [DIFFERENTIAL_CROSS, "parallel.tensor=2"],
        [DIFFERENTIAL_CROSS, "model.stack.2.head_dim=16"],
        [DIFFERENTIAL, "model.stack.0.kv_heads=2"],
        [DIFFERENTIAL, "model.stack.0.heads=3", "model.stack.0.head_dim=10"],
        ["model.stack.2.heads=8"],
        ["optimizer.warmup_steps=99", "optimizer.decay_steps=200"],
        ["optimizer.schedule=wsd", "optimizer.wsd_decay_steps=100"],
        ["optimizer.minimum_learning_rate=3e-4"],
        ["train.sequence_length=2"],
    ],
)
def test_numbers_that_fit(load: Load, overrides: list[str]) -> None:
    check_config(load(*overrides))


def test_pairs_are_counted_only_for_the_shared_kv_that_differential_layers_read(load: Load) -> None:
    first = "{shared_kv: {kv_heads: 1, head_dim: 8}}, {mixer: cross_attention, layers: 1, heads: 4}"
    second = (
        "{shared_kv: {kv_heads: 2, head_dim: 8}}, {mixer: differential_cross_attention, layers: 1, heads: 4}"
    )
    check_config(load(f"model.stack=[{first}, {second}]"))


def test_the_layout_is_what_remains_for_data_parallelism(load: Load) -> None:
    config = load(
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "parallel.virtual_pipeline=2",
        "parallel.context=4",
        "train.micro_batch_size=2",
    )
    assert check_layout(config, 32) == Layout(
        world_size=32, tensor=2, pipeline=2, virtual_pipeline=2, context=4, data=2, num_microbatches=2
    )


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["watch.hang_seconds=580"],
            "watch.hang_seconds=580 must be at least 40 less than watch.collective_timeout=600, at which torch ends a "
            "rank without saying which one it waited for: use for example watch.hang_seconds=260, or 0 to turn the "
            "watch off",
        ),
        (
            ["watch.on_spike=roll_back", "checkpoint.interval=0"],
            "watch.on_spike=roll_back goes back to the newest checkpoint, and checkpoint.interval=0 saves none before "
            "the end: save at an interval",
        ),
    ],
)
def test_watch(load: Load, overrides: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_config(load(*overrides))
    assert str(caught.value) == sentence


def test_no_watch_needs_no_time(load: Load) -> None:
    check_config(load("watch.hang_seconds=0", "watch.collective_timeout=10"))


@pytest.mark.parametrize("key", ["run.directory", "checkpoint.directory"])
def test_runs_write_to_folders(load: Load, key: str) -> None:
    with pytest.raises(UsageError, match=rf"{key}=s3:/b/x is a URL, and runs write to folders"):
        check_config(load(f"{key}=s3://b/x"))
