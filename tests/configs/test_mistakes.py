"""Every mistake in a recipe or an override ends in sentences that name the key, its value and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from trine.configs.errors import UsageError
from trine.configs.loading import RECIPES, load_config
from trine.configs.schema import Config

Load = Callable[..., Config]

MIXERS = (
    "attention, sliding_window, differential, differential_v2, retention, gated_retention, cross_attention, "
    "differential_cross_attention"
)
SECTIONS = "model, engine, deepspeed, parallel, train, optimizer, precision, kernels, data, evaluation, checkpoint, watch, run"

NO_SPLIT = "is not one of balanced, even, nor a list of the layers of each chunk such as [3, 5]"

UNKNOWN_KEYS = {
    "model.hiden_size=3": "model.hiden_size is not a key; did you mean model.hidden_size?",
    "optimzer.learning_rate=1": "optimzer is not a key; did you mean optimizer?",
    "--train.steps=3": "--train is not a key; did you mean train?",
    "train.learning_rate=3": "train.learning_rate is not a key; did you mean optimizer.learning_rate?",
    "train.interval=3": "train.interval is not a key; did you mean evaluation.interval or checkpoint.interval?",
    "train.lr=3": "train.lr is not a key; the keys of train are steps, global_batch_size, batch_ramp, micro_batch_size, "
    "sequence_length, sequence_ramp, document_masking, recompute, seed, deterministic, max_wall_time",
    "zzz=1": f"zzz is not a key; the keys of the configuration are {SECTIONS}",
    "model.stack.0.hedas=3": "model.stack.0.hedas is not a key of mixer gated_retention; "
    "did you mean model.stack.0.heads?",
    "model.stack.0.window=3": "model.stack.0.window is not a key of mixer gated_retention; "
    "the keys of model.stack.0 are layers, heads, head_dim, mixer, gate_normalizer, norm_eps, rope",
    "model.stack.0.rope.thet=3": "model.stack.0.rope.thet is not a key; did you mean model.stack.0.rope.theta?",
    "model.stack.1.shared_kv.kvheads=3": "model.stack.1.shared_kv.kvheads is not a key; "
    "did you mean model.stack.1.shared_kv.kv_heads?",
    "model.stack.1.mixer=attention": "model.stack.1.mixer is not a key; the keys of model.stack.1 are shared_kv",
}

WRONG_VALUES = {
    "train.steps=abc": "train.steps=abc must be a whole number",
    "train.steps=1.5": "train.steps=1.5 must be a whole number",
    "train.steps=[1]": "train.steps=[1] must be a whole number",
    "train.steps=null": "train.steps=null must be a whole number",
    "train.steps=0": "train.steps=0 must be greater than 0",
    "train.steps=.inf": "train.steps=.inf must be a finite number",
    "optimizer.learning_rate=fast": "optimizer.learning_rate=fast must be a number",
    "optimizer.learning_rate=.inf": "optimizer.learning_rate=.inf must be a finite number",
    "optimizer.learning_rate=.nan": "optimizer.learning_rate=.nan must be a finite number",
    "optimizer.clip_grad=-1": "optimizer.clip_grad=-1 must be at least 0",
    "optimizer.betas=0.9": "optimizer.betas=0.9 must be a list",
    "optimizer.betas=[0.9]": "optimizer.betas=[0.9] is too short: it has no optimizer.betas.1",
    "optimizer.betas=[1, 2, 3]": "optimizer.betas=[1, 2, 3] must be a list of no more than 2",
    "optimizer.betas=[0.9, 1]": "optimizer.betas.1=1 must be less than 1",
    "optimizer.schedule=cosin": "optimizer.schedule=cosin is not one of constant, linear, cosine, wsd; "
    "did you mean cosine?",
    "precision.compute=fp16": "precision.compute=fp16 is not one of fp32, bf16",
    "optimizer=null": "optimizer is empty: give it keys or leave it out",
    "train=3": "train=3 must be a section of keys",
    "parallel.sequence=maybe": "parallel.sequence=maybe must be true or false",
    "parallel.context_exchange=alltoall": "parallel.context_exchange=alltoall is not one of gather, all_to_all; "
    "did you mean all_to_all?",
    "parallel.pipeline_split=equal": f"parallel.pipeline_split=equal {NO_SPLIT}",
    "parallel.pipeline_split=balance": f"parallel.pipeline_split=balance {NO_SPLIT}; did you mean balanced?",
    "parallel.pipeline_split=3,5": f"parallel.pipeline_split=3,5 {NO_SPLIT}",
    "parallel.pipeline_split=8": f"parallel.pipeline_split=8 {NO_SPLIT}",
    "parallel.pipeline_split=null": f"parallel.pipeline_split=null {NO_SPLIT}",
    "parallel.pipeline_split={first: 3}": f"parallel.pipeline_split={{first: 3}} {NO_SPLIT}",
    "parallel.pipeline_split=[3, 0]": "parallel.pipeline_split.1=0 must be greater than 0",
    "parallel.pipeline_split=[3, five]": "parallel.pipeline_split.1=five must be a whole number",
    "parallel.pipeline_split.first=3": "parallel.pipeline_split={first: 3} " + NO_SPLIT,
    "train.recompute=selectiv": "train.recompute=selectiv is not one of none, selective, full; did you mean selective?",
    "train.recompute=true": "train.recompute=true is not one of none, selective, full",
    "train.document_masking=docs": "train.document_masking=docs must be true or false",
    "run.directory=2024-01-01": "run.directory=2024-01-01 must be a path: put it in quotes if it looks like a number "
    "or a date",
    "model.stack=[]": "model.stack=[] must be a list of 1 or more",
    "model.stack=attention": "model.stack=attention must be a list",
    "model.stack.2.heads=many": "model.stack.2.heads=many must be a whole number",
    "model.stack.1.shared_kv.kv_heads=0": "model.stack.1.shared_kv.kv_heads=0 must be greater than 0",
    "model.stack.0.mixer=gated-retention": f"model.stack.0.mixer=gated-retention is not one of {MIXERS}; "
    "did you mean gated_retention?",
    "model.stack.0.mixer=mamba": f"model.stack.0.mixer=mamba is not one of {MIXERS}",
    "model.stack.0.mixer=[a]": f"model.stack.0.mixer=[a] is not one of {MIXERS}",
    "model.stack.0=attention": f"model.stack.0=attention is not a segment: give it a mixer ({MIXERS}) or a shared_kv",
    "model.stack.0={layers: 2}": "model.stack.0={layers: 2} is not a segment: "
    f"give it a mixer ({MIXERS}) or a shared_kv",
    "model.stack.0={mixer: attention, layers: 1}": "model.stack.0.heads is missing, and it has no default",
    f"train.steps={'x' * 100}": f"train.steps={'x' * 57}... must be a whole number",
}

MALFORMED_OVERRIDES = {
    "steps": "override 'steps' has no '=': write it as key.sub=value",
    "": "override '' has no '=': write it as key.sub=value",
    "=3": "override '=3' has an empty key: write it as key.sub=value",
    "train..steps=3": "override 'train..steps=3' has an empty key: write it as key.sub=value",
    "train.steps=": "override 'train.steps=' has no value: write it as key.sub=value",
    "run.directory=@x": "override 'run.directory=@x' has a value that is not YAML: put it in quotes",
    "run.directory=2024-13-45": "override 'run.directory=2024-13-45' has a value that is not YAML: put it in quotes",
    "train.steps.x=3": "override 'train.steps.x=3': train.steps is 100, which has no keys",
    "train.steps.x.y=3": "override 'train.steps.x.y=3': train.steps is 100, which has no keys",
    "model.stack.3.layers=3": "override 'model.stack.3.layers=3': 3 is not an index of model.stack "
    "(they are from 0 to 2)",
    "model.stack.-1.layers=3": "override 'model.stack.-1.layers=3': -1 is not an index of model.stack "
    "(they are from 0 to 2)",
    "model.stack.first=3": "override 'model.stack.first=3': first is not an index of model.stack "
    "(they are from 0 to 2)",
}

BROKEN_FILES = {
    "": "holds no configuration: write sections such as 'model:' and 'train:'",
    "- a\n": "holds no configuration: write sections such as 'model:' and 'train:'",
    "a: 1\nb: [\n": "is not valid YAML at line 3: expected the node content, but found '<stream end>'",
    "a:\n\t- b\n": r"is not valid YAML at line 2: found character '\t' that cannot start any token",
    "a: 1\n---\nb: 2\n": "is not valid YAML at line 2: but found another document",
    "a: !!python/object/apply:os.getcwd []\n": "is not valid YAML at line 1: could not determine a constructor for "
    "the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd'",
    "a: 2024-13-45\n": "is not valid YAML: month must be in 1..12",
    "train: {steps: 1}\nrun: {}\ntrain: {}\n": "gives train at line 1 and again at line 3: keep one",
    "run: {a: [{b: 1, b: 1}]}\n": "gives b at line 1 and again at line 1: keep one",
}


@pytest.mark.parametrize(
    ("override", "sentence"), (UNKNOWN_KEYS | WRONG_VALUES | MALFORMED_OVERRIDES).items()
)
def test_a_mistaken_override(load: Load, override: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(override)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(("text", "sentence"), BROKEN_FILES.items())
def test_a_broken_file(recipe: Path, text: str, sentence: str) -> None:
    recipe.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_config(recipe)
    assert str(caught.value) == f"{recipe} {sentence}"


def test_a_file_of_bytes(recipe: Path) -> None:
    recipe.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="small.yaml is not UTF-8 text, so it is no YAML recipe$"):
        load_config(recipe)


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=" cannot be read: Is a directory$"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("configs/diferential/830m.yaml", "did you mean {}/differential/830m.yaml or"),
        ("3b.yaml", "did you mean {}/differential/3b.yaml or {}/yoco/3b.yaml?"),
        ("configs/demmo.yaml", "did you mean {}/demo.yaml?"),
        ("yoco/13b", "did you mean {}/yoco/13b.yaml or"),
        ("my-own-model.yaml", "recipes are in {}"),
    ],
)
def test_a_missing_file(asked: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        load_config(Path(asked))
    assert str(caught.value).startswith(f"{asked} does not exist; {answer.replace('{}', str(RECIPES))}")


def test_missing_recipes_are_named_from_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)
    with pytest.raises(UsageError, match=r"did you mean configs/demo\.yaml\?$"):
        load_config(Path("configs/demmo.yaml"))


def test_a_misspelt_key_is_one_mistake_and_not_a_missing_key_too(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("hidden_size: 64", "hiden_size: 64", 1))
    with pytest.raises(UsageError) as caught:
        load_config(recipe)
    assert str(caught.value) == "model.hiden_size is not a key; did you mean model.hidden_size?"


def test_several_mistakes_are_one_line_each(load: Load) -> None:
    with pytest.raises(UsageError) as caught:
        load("train.steps=x", "model.stack.0.heads=0", "model.stack.2.mixer=foo")
    assert str(caught.value).splitlines() == [
        "model.stack.0.heads=0 must be greater than 0",
        f"model.stack.2.mixer=foo is not one of {MIXERS}",
        "train.steps=x must be a whole number",
    ]


def test_no_more_than_eight_lines_are_shown(load: Load) -> None:
    with pytest.raises(UsageError) as caught:
        load(*(f"zzz{number}=1" for number in range(12)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 8
    assert lines[-1] == "and 5 more mistakes"
    with pytest.raises(UsageError) as caught:
        load(*(f"zzz{number}=1" for number in range(8)))
    assert all("is not a key" in line for line in str(caught.value).splitlines())
