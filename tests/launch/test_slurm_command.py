"""What ``trine launch slurm`` refuses, in one sentence each, before a job is made of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from launching import write_run

from trine.launch.cli import main
from trine.launch.slurm_options import seconds_of_limit
from trine.pretrain.exit_state import ExitState, write

pytestmark = pytest.mark.timeout(60)

Capture = pytest.CaptureFixture[str]
SIZE = ["--nodes", "2", "--gpus-per-node", "8"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's folder as the working directory."""
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: Capture, *words: str, code: int = 2) -> str:
    """The one sentence in which the command is refused."""
    assert main(["launch", "slurm", "recipe.yaml", *words]) == code
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    return told.err.removeprefix("trine: ").rstrip("\n")


IMAGE = ["--container", "image.sif", "--container-runtime", "apptainer"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--nodes", "0"], "--nodes 0 is too few: use 1 or more"),
        (["--gpus-per-node", "0"], "--ranks-per-node 0 is too few: use 1 or more; machines without GPUs need it"),
        (
            ["--ranks-per-node", "16"],
            "--ranks-per-node 16 is more than --gpus-per-node 8, and each rank needs a GPU of its own: use 8 or fewer",
        ),
        (
            ["--ranks-per-node", "5", "parallel.tensor=2", "train.global_batch_size=5"],
            "parallel.tensor=2 does not divide --ranks-per-node 5, so tensor ranks would exchange over the network: the "
            "tensor sizes that stay within a node are 1, 5",
        ),
        (
            ["--ranks-per-node", "3", "--nodes", "1"],
            "a world size of 3 is not a multiple of parallel.tensor=2 x parallel.pipeline=1 x parallel.context=1 = 2: "
            "start 2 or 4 ranks, or divide the model otherwise",
        ),
        (["train.stepz=3"], "train.stepz is not a key; did you mean train.steps?"),
        (["train.steps"], "'train.steps' is no override: write key.sub=value, such as train.steps=100"),
        (
            ["--time", "tomorrow"],
            "--time tomorrow is no time limit: write minutes, or hours:minutes:seconds as in 24:00:00, or days-hours as in 2-12",
        ),
        (
            ["--time", "5"],
            "--time 5 is 300 seconds, not longer than --warn-seconds 300, so the run would be told to save before it "
            "begins: raise the one or lower the other",
        ),
        (["--warn-seconds", "70000", "--time", "9-0"], "--warn-seconds 70000 is more than Slurm takes: use 65535 or less"),
        (["--partition", ""], "--partition is empty: give it a value, or leave it out"),
        (["--job-name", "a b"], "--job-name='a b' holds a space, which no such name of Slurm does: take it out"),
        (["--max-failures", "0"], "--max-failures 0 is too few: use 1 or more"),
        (["--chain", "0"], "--chain 0 is too few: use 1 or more"),
        (["--env", "1A=b"], "--env 1A=b does not begin with the name of a variable: use letters, digits and _"),
        (["--env", "A"], "--env A is no NAME=VALUE: write for example --env NCCL_IB_HCA=mlx5"),
        (
            ["--sbatch-arg=-N3"],
            "--sbatch-arg=-N3 is no long option of sbatch: write it as in --sbatch-arg=--constraint=ib",
        ),
        (
            ["--sbatch-arg=--sig=B:TERM@1"],
            "--sbatch-arg=--sig=B:TERM@1 would change --signal, which the script needs as it is: use the options of "
            "trine launch slurm",
        ),
        (
            ["--chain", "2", "--sbatch-arg=--dependency=afterok:1"],
            "--sbatch-arg=--dependency=afterok:1 does not go with --chain 2, whose jobs wait for each other: leave one out",
        ),
        (
            ["--container", "image.sif"],
            "--container image.sif does not say what starts it: add --container-runtime pyxis or apptainer",
        ),
        (["--container-runtime", "pyxis"], "--container-runtime pyxis needs an image: add --container IMAGE"),
        (["--mount", "/a:/b"], "--mount /a:/b needs an image: add --container IMAGE"),
        (
            ["--container", "./absent.sif", "--container-runtime", "apptainer"],
            "--container ./absent.sif is not there: name an image file, or one of a registry",
        ),
        ([*IMAGE, "--mount", "a:/b"], "--mount a:/b is not SOURCE:TARGET or SOURCE:TARGET:ro with absolute paths"),
        ([*IMAGE, "--mount", "/a:/b:rx"], "--mount /a:/b:rx is not SOURCE:TARGET or SOURCE:TARGET:ro with absolute paths"),
        (
            [*IMAGE, "--mount", "/a,/c:/b"],
            "--mount=/a,/c holds a comma or a colon, with which containers divide lists of mounts: rename it",
        ),
        (
            [*IMAGE, "--mount", "/elsewhere:/"],
            "--mount /elsewhere:/ hides run.directory={here}/run in the container: mount it elsewhere",
        ),
        (
            [*IMAGE, "--mount", "/:/:ro"],
            "--mount /:/:ro does not let run.directory={here}/run be written: leave out :ro",
        ),
        (
            ["data.directory=nowhere"],
            "the folder of prepared data nowhere is not there; prepare the data first, or name the folder that holds it",
        ),
        (
            ["run.directory=recipe.yaml/run"],
            "run.directory=recipe.yaml/run cannot be made, since {here}/recipe.yaml is no folder: choose another place",
        ),
        (
            ["checkpoint.directory=recipe.yaml"],
            "checkpoint.directory=recipe.yaml cannot be made, since {here}/recipe.yaml is no folder: choose another place",
        ),
        (["run.directory=a\\b"], "run.directory={here}/a\\b holds a backslash, which Slurm takes for something else: rename it"),
    ],
)  # fmt: skip
def test_refused(words: list[str], sentence: str, here: Path, capsys: Capture) -> None:
    assert refused(capsys, *SIZE, *words) == sentence.replace("{here}", str(here))
    assert refused(capsys, *SIZE, *words, "--submit") == sentence.replace("{here}", str(here))
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--partition", "p\n#SBATCH --uid=0"],
        ["--job-name", "a\rb"],
        ["--exclude", "n\x0b"],
        ["--sbatch-arg=--comment=a\nb"],
        ["--env", "A=b\nc"],
        ["--python", "p\nq"],
        ["run.directory=a\nb"],
        ["--container", "i\n", "--container-runtime", "pyxis"],
    ],
)
def test_nothing_begins_a_line_of_its_own(words: list[str], capsys: Capture) -> None:
    assert "holds a line break or another control character: take it out" in refused(capsys, *SIZE, *words)


def test_folders_of_a_recipe_begin_no_line_either(here: Path, capsys: Capture) -> None:
    recipe = (here / "recipe.yaml").read_text()
    (here / "recipe.yaml").write_text(recipe.replace("run: {directory: run}", 'run: {directory: "run\\n#SBATCH --uid=0"}'))
    assert refused(capsys, *SIZE).startswith("run.directory='")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("10:30", 630), ("24:00:00", 86400), ("2-12", 216000), ("1-00:30", 88200), ("1-1:1:1", 90061)],
)
def test_time_limits(text: str, seconds: int) -> None:
    assert seconds_of_limit(text) == seconds


def test_submission_needs_slurm(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("PATH", str(here))
    assert refused(capsys, *SIZE, "--submit") == (
        "sbatch is not on this machine: submit where Slurm is, or print the script without --submit and take it there"
    )


def test_a_finished_run_is_not_submitted(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    (here / "run").mkdir()
    write(here / "run", ExitState("finished", False, "all steps are done", 1000, 1000, None, 0))
    told = refused(capsys, *SIZE, "--submit")
    assert told.startswith(f"{here}/run has finished its 1000 steps: raise train.steps=1000 to train further")
    monkeypatch.setenv("PATH", str(here))
    assert refused(capsys, *SIZE, "train.steps=2000", "--submit").startswith("sbatch is not on this machine")


def test_remote_data_are_not_asked_for(capsys: Capture) -> None:
    words = ["data.directory=https://data.invalid/tokens", "model.vocabulary_size=300"]
    assert main(["launch", "slurm", "recipe.yaml", *SIZE, *words]) == 0
    assert "data.directory=https://data.invalid/tokens" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["slurm"], ["mpi"], ["local"], ["status"], ["stop"]])
def test_help(words: list[str], capsys: Capture) -> None:
    assert main(["launch", *words, "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: {' '.join(['trine', 'launch', *words])}")
    assert words == [] or ("example" in told and "exit codes: " in told)


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from trine.launch.cli import main; main(['launch', 'slurm', '--help']); "
        "print({'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
