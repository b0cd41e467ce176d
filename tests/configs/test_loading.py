"""What a recipe and its overrides say is what the configuration holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from trine.configs.errors import UsageError
from trine.configs.loading import dump_config, load_config, set_vocabulary
from trine.configs.schema import Config
from trine.configs.stack import GatedRetentionSegment

Load = Callable[..., Config]


def test_defaults_fill_what_the_recipe_leaves_out(load: Load) -> None:
    config = load()
    assert config.train.steps == 100
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.checkpoint_directory == Path("runs/small/checkpoints")


@pytest.mark.parametrize("written", ["3e-4", "3.0e-4", "0.0003", "'3e-4'", "3E-4"])
def test_exponents_are_numbers_although_yaml_reads_some_as_text(
    load: Load, recipe: Path, written: str
) -> None:
    assert load(f"optimizer.learning_rate={written}").optimizer.learning_rate == 3e-4
    recipe.write_text(recipe.read_text() + f"optimizer: {{learning_rate: {written}}}\n")
    assert load().optimizer.learning_rate == 3e-4


def test_exponents_are_numbers_in_lists_and_in_segments(load: Load) -> None:
    config = load("optimizer.betas=[9e-1, 95e-2]", "model.stack.0.norm_eps=1e-6", "model.norm_eps=1e-6")
    segment = config.model.stack[0]
    assert isinstance(segment, GatedRetentionSegment)
    assert (config.optimizer.betas, segment.norm_eps, config.model.norm_eps) == ((0.9, 0.95), 1e-6, 1e-6)


def test_overrides_reach_lists_absent_sections_and_whole_segments(load: Load) -> None:
    config = load(
        "model.stack.0.layers=4",
        "model.stack.2={mixer: differential_cross_attention, layers: 6, heads: 2}",
        "model.stack.2.layers=8",
        "parallel.tensor=2",
        "optimizer.betas=[0.9, 0.98]",
        "run.directory=runs/a=b",
        "model.tied_embeddings=true",
    )
    assert [getattr(segment, "layers", None) for segment in config.model.stack] == [4, None, 8]
    assert config.parallel.tensor == 2
    assert config.optimizer.betas[1] == 0.98
    assert config.run.directory == Path("runs/a=b")
    assert config.model.tied_embeddings is True


@pytest.mark.parametrize(
    ("written", "read"),
    [("[3,5]", (3, 5)), ("['3', 5]", (3, 5)), ("even", "even"), ("balanced", "balanced")],
)
def test_a_pipeline_split_is_a_word_or_a_list(
    load: Load, written: str, read: object, tmp_path: Path
) -> None:
    config = load(f"parallel.pipeline_split={written}")
    assert config.parallel.pipeline_split == read
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "resolved.yaml") == config


def test_a_later_override_wins_and_null_unsets_an_optional_key(load: Load) -> None:
    assert load("train.steps=5", "train.steps=7").train.steps == 7
    assert load("model.vocabulary_size=99", "model.vocabulary_size=null").model.vocabulary_size is None


def test_an_override_fills_a_section_that_the_recipe_leaves_empty(load: Load, recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "optimizer:\n")
    assert load("optimizer.warmup_steps=3").optimizer.warmup_steps == 3


def test_merge_keys_are_no_repeated_keys(recipe: Path) -> None:
    text = recipe.read_text().replace(
        "data:", "evaluation: {<<: {interval: 5, batches: 2}, interval: 7}\ndata:"
    )
    recipe.write_text(text)
    assert load_config(recipe).evaluation.model_dump() == {"interval": 7, "batches": 2}


def test_dump_loads_to_an_equal_configuration(load: Load, tmp_path: Path) -> None:
    config = load(
        "model.stack.0.rope={theta: 64e4, spacing: standard}",
        "optimizer={learning_rate: 1e-05, minimum_learning_rate: 1.28e-5, eps: 1e-12, decay_steps: 7}",
        "run.directory='2024-01-01'",
        "data.directory='1e5'",
        "checkpoint.directory=null",
        "model.vocabulary_size=1000",
    )
    text = dump_config(config)
    (tmp_path / "resolved.yaml").write_text(text)
    assert load_config(tmp_path / "resolved.yaml") == config


def test_dump_is_in_reading_order_and_leaves_out_what_is_unset(load: Load) -> None:
    text = dump_config(load())
    sections = [line.partition(":")[0] for line in text.splitlines() if not line.startswith((" ", "-"))]
    assert sections == [name for name in Config.model_fields if name != "deepspeed"]
    assert "- mixer: gated_retention\n" in text
    assert "null" not in text


def test_the_vocabulary_is_the_datas_unless_the_recipe_names_a_larger_one(load: Load) -> None:
    config = load()
    assert set_vocabulary(config, 2048).model.vocabulary_size == 2048
    assert config.model.vocabulary_size is None
    assert set_vocabulary(load("model.vocabulary_size=4096"), 2048).model.vocabulary_size == 4096
    with pytest.raises(
        UsageError, match="^model.vocabulary_size=100 is smaller than the 2048 token ids of the data; "
    ):
        set_vocabulary(load("model.vocabulary_size=100"), 2048)
