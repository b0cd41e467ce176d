"""The command line: its help, its exit codes, and what it refuses before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trine import __version__
from trine.launch.cli import main

pytestmark = pytest.mark.timeout(60)

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def prepared(recipe: Path, tmp_path: Path, capsys: Capture) -> Path:
    """A recipe whose data is prepared, with a vocabulary of 259 ids."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number}.txt").write_text(f"document {number} of a small corpus. " * 8)
    output = str(tmp_path / "data")
    words = ["data", "prepare", str(corpus), "--output", output, "--train-tokenizer", "259"]
    assert main([*words, "--validation-fraction", "0.2"]) == 0
    told = capsys.readouterr()
    assert "tokens of" in told.out
    assert "vocabulary 259" in told.out
    assert all(line.startswith("trine: ") for line in told.err.splitlines())
    return recipe


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trine {__version__}\n"


@pytest.mark.parametrize("words", [[], ["pretrain"], ["parity"], ["data"], ["data", "prepare"], ["doctor"]])
def test_help(words: list[str], capsys: Capture) -> None:
    assert main([*words, "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: {' '.join(['trine', *words])}")
    assert "exit codes: 0" in told or words == ["data"]
    assert "example" in told or words in ([], ["data"])


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from trine.launch.cli import main; main(['pretrain', '--help']); main(['parity', '--help']); "
        "print({'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def refused(capsys: Capture, *words: str | Path) -> str:
    """The one sentence in which a command is refused."""
    assert main([str(word) for word in words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("trine: ")
    assert told.err.count("\n") == 1
    return told.err


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], "COMMAND"),
        (["pretrian"], "pretrain"),
        (["pretrain"], "CONFIG.yaml"),
        (["pretrain", "c.yaml", "--nproc", "two"], "'two'"),
        (["pretrain", "c.yaml", "--nprocs", "2"], "--nprocs"),
        (["pretrain", "c.yaml", "train.steps"], "'train.steps' is no override"),
        (["pretrain", "absent.yaml"], "absent.yaml does not exist"),
        (["parity"], "CONFIG.yaml"),
        (["parity", "absent.yaml"], "absent.yaml does not exist"),
        (["parity", "c.yaml", "--steps", "few"], "'few'"),
        (["parity", "c.yaml", "--device", "tpu"], "'tpu'"),
        (["data", "prepare", "--output", "o", "--train-tokenizer", "300"], "INPUT"),
        (["data", "prepare", "x", "--train-tokenizer", "300"], "--output"),
        (["data", "prepare", "x", "--output", "o"], "--train-tokenizer"),
        (["data", "prepare", "absent", "--output", "o", "--train-tokenizer", "300"], "absent"),
        (["doctor", "now"], "now"),
    ],
)
def test_wrong_use(words: list[str], names: str, capsys: Capture) -> None:
    assert names in refused(capsys, *words)


def test_overrides_may_stand_on_both_sides_of_an_option(recipe: Path, capsys: Capture) -> None:
    assert "train.stops" in refused(capsys, "pretrain", recipe, "train.steps=3", "--nproc", "1", "train.stops=4")


def test_data_must_be_prepared(recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    assert str(tmp_path / "data") in refused(capsys, "pretrain", recipe)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--nproc", "0"], "--nproc 0"),
        (["--nproc", "3", "parallel.pipeline=2"], "a world size of 3"),
        # Known only from the data: 259 ids that are padded to a multiple of 1 cannot be cut in two.
        (["parallel.tensor=2", "model.vocabulary_multiple=1"], "model.vocabulary_size=259"),
        (["model.vocabulary_size=258"], "259 token ids"),
    ],
)
def test_layouts_are_refused_before_a_rank_starts(
    words: list[str], names: str, prepared: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert names in refused(capsys, "pretrain", prepared, *words)
    assert not (tmp_path / "run").exists()


def test_damaged_data_is_a_failure(prepared: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "data" / "index.json").write_text("{")
    assert main(["pretrain", str(prepared)]) == 1
    assert "index.json" in capsys.readouterr().err


def test_other_launchers_start_the_ranks(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert "under torchrun" in refused(capsys, "pretrain", recipe, "--nproc", "2")


def test_as_a_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trine", "pretrain", str(tmp_path / "absent.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"trine: {tmp_path / 'absent.yaml'} does not exist")
    assert "Traceback" not in done.stderr
