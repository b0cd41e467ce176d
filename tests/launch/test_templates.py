"""The example scripts are what the command prints today; ``python tests/launch/test_templates.py`` writes them anew."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATES = REPOSITORY / "launch" / "templates"
PLACE = "/shared"
"""What stands in the examples for the folder in which the command was given."""

RUN = ["recipes/3b.yaml", "data.directory=tokens", "run.directory=runs/yoco-3b", "parallel.tensor=4"]
JOB = ["--job-name", "yoco-3b", "--partition", "batch", "--account", "research"]
EXAMPLES = {
    "dgx_h100.sbatch": [
        *RUN, "--nodes", "4", "--gpus-per-node", "8", "--cpus-per-rank", "14", "--time", "24:00:00", *JOB,
        "--sbatch-arg=--exclusive", "--python", "{place}/venv/bin/python",
    ],
    "h200_torchrun_pyxis.sbatch": [
        *RUN, "--nodes", "4", "--gpus-per-node", "8", "--time", "2-00", "--warn-seconds", "600", *JOB,
        "--launcher", "torchrun", "--container", "nvcr.io#nvidia/pytorch:26.01-py3", "--container-runtime", "pyxis",
        "--mount", "/raid/scratch:/scratch", "--env", "NCCL_SOCKET_IFNAME=ens",
    ],
    "apptainer_chain.sbatch": [
        *RUN, "--nodes", "2", "--gpus-per-node", "4", "--time", "8:00:00", *JOB, "--chain", "6",
        "--container", "{place}/images/trine.sif", "--container-runtime", "apptainer",
    ],
}  # fmt: skip
"""The commands, of which each prints one of the scripts."""


def script(name: str, place: Path) -> str:
    """What the command of an example prints in the folder ``place``, told as if that were ``PLACE``."""
    from small_folder import write_folder

    from trine.launch.cli import main

    for folder in ("recipes", "images"):
        (place / folder).mkdir(exist_ok=True)
    (place / "images" / "trine.sif").touch()
    shutil.copy(REPOSITORY / "configs" / "yoco" / "3b.yaml", place / "recipes")
    if not (place / "tokens").exists():
        write_folder(place / "tokens")
    words = [word.replace("{place}", str(place)) for word in EXAMPLES[name]]
    printed = io.StringIO()
    with contextlib.chdir(place), contextlib.redirect_stdout(printed):
        assert main(["launch", "slurm", *words]) == 0
    return printed.getvalue().replace(str(place), PLACE)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_what_is_printed(name: str, tmp_path: Path) -> None:
    assert (TEMPLATES / name).read_text() == script(name, tmp_path), f"write it anew: python {Path(__file__).name}"


def test_there_are_no_others() -> None:
    assert {path.name for path in TEMPLATES.iterdir()} == set(EXAMPLES)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY / "tests" / "support"))
    TEMPLATES.mkdir(exist_ok=True)
    for example in EXAMPLES:
        with tempfile.TemporaryDirectory() as scratch:
            (TEMPLATES / example).write_text(script(example, Path(scratch).resolve()))
