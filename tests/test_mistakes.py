"""The likeliest mistakes of a user, and the one sentence that each of them gets before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from trine.configs.loading import RECIPES
from trine.launch.cli import main

DEMO = str(RECIPES / "demo.yaml")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small preparation."""
    from trine.data_pipeline.preparation.prepare import prepare

    folder = tmp_path_factory.mktemp("corpus")
    for n in range(8):
        (folder / f"{n}.txt").write_text(f"number {n} of the documents that nobody needs to read " * 40)
    output = tmp_path_factory.mktemp("data") / "tokens"
    prepare([str(folder)], output, train_tokenizer=280, validation_fraction=0.4)
    return output


MISTAKES = {
    "a misspelt key": (
        ["train.stepz=10"],
        "train.stepz is not a key; did you mean train.steps?",
    ),
    "an unknown mixer": (
        ["model.stack.0.mixer=retntion"],
        "model.stack.0.mixer=retntion is not one of attention, sliding_window, differential, differential_v2, "
        "retention, gated_retention, cross_attention, differential_cross_attention; did you mean retention?",
    ),
    "heads that tensor parallelism does not divide": (
        ["parallel.tensor=3"],
        "model.stack.0.heads=4 cannot be divided over parallel.tensor=3: the tensor sizes that fit this model are 1, 2",
    ),
    "a pipeline split that does not add up": (
        ["parallel.pipeline_split=[3, 4]"],
        "parallel.pipeline_split=[3, 4] puts 7 layers into 2 chunks, and model.stack has 6 layers for the 2 chunks of "
        "parallel.pipeline=2: use for example [3, 3], or balanced",
    ),
    "a batch that the ranks do not divide": (
        ["train.global_batch_size=6", "--nproc", "8"],
        "train.global_batch_size=6 is not a multiple of train.micro_batch_size=2 x 4 data-parallel ranks = 8: use 8",
    ),
    "a number of ranks that the layout does not divide": (
        ["--nproc", "3"],
        "a world size of 3 is not a multiple of parallel.tensor=1 x parallel.pipeline=2 x parallel.context=1 = 2: "
        "start 2 or 4 ranks, or divide the model otherwise",
    ),
    "data that are not prepared": (
        ["data.directory=nowhere"],
        "the folder of prepared data nowhere is not there; prepare the data first, or name the folder that holds it",
    ),
    "a cross mixer without shared K,V": (
        ["model.stack=[{mixer: cross_attention, layers: 2, heads: 4}]"],
        "model.stack.0 is cross_attention, which reads a shared_kv, and none comes before it: "
        "put a shared_kv segment there",
    ),
    "a value of the wrong type": (
        ["train.steps=ten"],
        "train.steps=ten must be a whole number",
    ),
    "a vocabulary smaller than the data's": (
        ["model.vocabulary_size=100"],
        None,
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_sentence_and_exit_code_2(
    mistake: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, sentence = MISTAKES[mistake]
    run = tmp_path / "run"
    code = main(["pretrain", DEMO, f"data.directory={data}", f"run.directory={run}", *arguments])
    printed = capsys.readouterr().err
    assert code == 2
    assert printed.count("\n") == 1
    if sentence is None:
        assert "model.vocabulary_size=100" in printed
    else:
        assert printed == f"trine: {sentence}\n"
    assert not run.exists()


def test_misspelt_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = DEMO.replace("demo", "dem")
    assert main(["pretrain", wrong]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"trine: {wrong} does not exist; did you mean ")
    assert printed.endswith("demo.yaml?\n")
